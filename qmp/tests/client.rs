//! The QMP client against a real QEMU.

mod common;

use common::{PATIENCE, Qemu, TempDir};
use qmp::{Client, CommandError, ConnectError};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;
use tokio::net::UnixStream;

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_typed_command_and_a_monitor_line_are_answered() {
    let qemu = Qemu::start(&["-S", "-name", "guest=vm42"]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    assert_eq!(
        client.execute(qapi::qmp::query_name {}).await.unwrap().name.as_deref(),
        Some("vm42")
    );
    assert!(client.hmp("info status").await.unwrap().contains("paused"));
    assert_eq!(client.peer_pid(), i32::try_from(qemu.pid()).ok());
    assert!(client.greeting().version.0 >= 7);
}

#[tokio::test]
async fn a_monitor_that_spreads_its_messages_over_lines_is_understood() {
    let dir = TempDir::new();
    let pretty = format!("unix:{},server=on,wait=off", dir.path().join("p").display());
    let _qemu = Qemu::start(&["-S", "-name", "guest=vm42", "-qmp-pretty", &pretty]);
    let client = Client::connect(&dir.path().join("p"), PATIENCE).await.unwrap();
    assert_eq!(
        client.execute(qapi::qmp::query_name {}).await.unwrap().name.as_deref(),
        Some("vm42")
    );
    let mut events = client.events();
    client.execute(qapi::qmp::cont {}).await.unwrap();
    assert_eq!(events.recv().await.unwrap().name, "RESUME");
}

#[tokio::test]
async fn a_missing_socket_and_one_without_listener_are_told_apart() {
    let mut qemu = Qemu::start(&["-S"]);
    let missing = Client::connect(&qemu.dir().join("none"), SHORT).await;
    assert!(matches!(missing, Err(ConnectError::NoSocket { .. })), "{missing:?}");
    qemu.kill();
    let refused = Client::connect(&qemu.qmp(), SHORT).await;
    assert!(matches!(refused, Err(ConnectError::Refused { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_socket_held_by_another_client_is_said_to_be_held_and_is_free_afterwards() {
    let qemu = Qemu::start(&["-S"]);
    let holder = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    // The first waits in QEMU's listen queue, later ones find it full: the same answer. The plain connections stay.
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let second = Client::connect(&qemu.qmp(), SHORT).await;
        assert!(matches!(second, Err(ConnectError::Held { .. })), "{second:?}");
        waiting.push(UnixStream::connect(qemu.qmp()).await);
    }
    assert!(holder.execute(qapi::qmp::query_status {}).await.is_ok());
    drop((holder, waiting));
    Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_does_not_speak_qmp_is_named_with_what_it_said() {
    let dir = TempDir::new();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || {
        listener
            .accept()
            .unwrap()
            .0
            .write_all(b"SSH-2.0-OpenSSH_9.2\r\n")
            .unwrap()
    });
    match Client::connect(&path, PATIENCE).await {
        Err(ConnectError::NotQmp { found, .. }) => assert!(found.contains("SSH-2.0"), "{found}"),
        other => panic!("{other:?}"),
    }
    peer.join().unwrap();
}

#[tokio::test]
async fn a_refusal_names_the_command_and_the_connection_goes_on() {
    let qemu = Qemu::start(&["-S"]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    let refused = client
        .execute_as::<Value>("no-such-command", json!({}))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, CommandError::Refused { class, .. } if class == "CommandNotFound"),
        "{refused}"
    );
    assert!(refused.to_string().contains("no-such-command"), "{refused}");
    assert!(client.execute(qapi::qmp::query_status {}).await.is_ok());
}

#[tokio::test]
async fn every_event_arrives_also_those_the_types_do_not_know() {
    let qemu = Qemu::start(&[]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    let mut events = client.events();
    client.execute(qapi::qmp::stop {}).await.unwrap();
    client.execute(qapi::qmp::cont {}).await.unwrap();
    for name in ["STOP", "RESUME"] {
        let event = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
        assert_eq!(event.name, name);
        assert!(event.at_us.is_some());
    }
}

#[tokio::test]
async fn events_end_with_the_connection() {
    let qemu = Qemu::start(&[]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    let mut events = client.events();
    qemu.signal("KILL");
    let end = async { while events.recv().await.is_ok() {} };
    tokio::time::timeout(PATIENCE, end).await.unwrap();
}

#[tokio::test]
async fn a_late_reply_is_dropped_and_harms_nothing() {
    let qemu = Qemu::start(&["-S"]);
    let mut client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    client.set_command_timeout(SHORT);
    qemu.signal("STOP");
    let late = client.execute(qapi::qmp::query_version {}).await;
    assert!(matches!(late, Err(CommandError::Timeout { .. })), "{late:?}");
    qemu.signal("CONT");
    client.set_command_timeout(PATIENCE);
    for _ in 0..3 {
        assert!(!client.execute(qapi::qmp::query_status {}).await.unwrap().running);
    }
}

#[tokio::test]
async fn commands_waiting_when_qemu_dies_are_told_so() {
    let mut qemu = Qemu::start(&["-S"]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    qemu.kill();
    for _ in 0..2 {
        let lost = client.execute(qapi::qmp::query_status {}).await;
        assert!(matches!(lost, Err(CommandError::Disconnected { .. })), "{lost:?}");
    }
}

#[tokio::test]
async fn a_descriptor_is_passed_and_written_through() {
    let qemu = Qemu::start(&["-S"]);
    let client = Client::connect(&qemu.qmp(), PATIENCE).await.unwrap();
    let path = qemu.dir().join("dump");
    let mut file = std::fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let fd = file.try_clone().unwrap().into();
    client
        .execute_with_fd(qapi::qmp::getfd { fdname: "out".into() }, fd)
        .await
        .unwrap();
    let dump = json!({"paging": false, "protocol": "fd:out", "begin": 0, "length": 4096});
    client.execute_as::<Value>("dump-guest-memory", dump).await.unwrap();
    let mut magic = [0; 4];
    file.rewind().unwrap();
    file.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"\x7fELF");
}

/// Plays back what QEMU 10.0.2 was seen to do after a client was killed in the middle of a command: the command's
/// result goes to the next client, before the greeting or behind it, with an id of the killed client's.
fn answer_with_leftovers(listener: UnixListener) {
    let (mut socket, _) = listener.accept().unwrap();
    let mut requests = BufReader::new(socket.try_clone().unwrap()).lines();
    socket
        .write_all(b"{\"return\": {\"total\": 0, \"status\": \"none\", \"completed\": 0}, \"id\": 4}\r\n")
        .unwrap();
    let version = json!({"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""});
    let greeting = json!({"QMP": {"version": version, "capabilities": ["oob"]}});
    socket.write_all(format!("{greeting}\r\n").as_bytes()).unwrap();
    for (stale_id, result) in [(1, json!({})), (2, json!({"name": "vm42"}))] {
        let request: Value = serde_json::from_str(&requests.next().unwrap().unwrap()).unwrap();
        let stale = json!({"return": {"name": "of another"}, "id": stale_id});
        let reply = json!({"return": result, "id": request["id"]});
        socket.write_all(format!("{stale}\r\n{reply}\r\n").as_bytes()).unwrap();
    }
}

#[tokio::test]
async fn results_meant_for_a_client_that_was_killed_are_not_taken_for_ours() {
    let dir = TempDir::new();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = std::thread::spawn(move || answer_with_leftovers(listener));
    let client = Client::connect(&path, PATIENCE).await.unwrap();
    assert_eq!(
        client.execute(qapi::qmp::query_name {}).await.unwrap().name.as_deref(),
        Some("vm42")
    );
    peer.join().unwrap();
}
