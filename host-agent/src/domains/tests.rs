//! Command lines in many spellings, and what is said when there is no domain to give.

use super::command_line::{CommandLine, Monitor};
use super::{Domain, DomainError, Domains, QmpAddress, QmpSocket};
use std::path::{Path, PathBuf};

/// Reads a command line; spaces separate words, `_` is a space in a word.
fn parse(line: &str) -> CommandLine {
    let words: Vec<String> = line.split(' ').map(|word| word.replace('_', " ")).collect();
    CommandLine::parse(words.iter().map(|word| word.as_bytes()), &|_| None)
}

fn name(line: &str) -> Option<String> {
    parse(&format!("qemu {line}")).name
}

fn monitors(line: &str) -> Vec<QmpAddress> {
    parse(&format!("qemu {line}"))
        .monitors
        .into_iter()
        .map(|monitor| monitor.address)
        .collect()
}

fn unix(path: &str) -> QmpAddress {
    QmpAddress::Unix(PathBuf::from(path))
}

#[test]
fn a_name_is_found_in_every_spelling() {
    for line in [
        "-name vm42",
        "--name vm42",
        "-name guest=vm42",
        "-name guest=vm42,debug-threads=on",
        "-name vm42,process=x",
        "-name process=x,guest=vm42",
        "-S -nodefaults disk.img -name vm42",
        "-name other -name vm42",
        "-name vm42 -name debug-threads=on",
    ] {
        assert_eq!(name(line).as_deref(), Some("vm42"), "{line}");
    }
    assert_eq!(name("-name a,,b,process=c").as_deref(), Some("a,b"));
    assert_eq!(name("-name a_b").as_deref(), Some("a b"));
    assert_eq!(name("-name process=x"), None);
    assert_eq!(name("-name"), None);
    assert_eq!(name(""), None);
}

#[test]
fn the_argument_of_another_option_is_no_option() {
    assert_eq!(name("-append -name -name vm42").as_deref(), Some("vm42"));
    assert_eq!(
        name("-append root=/dev/vda_-name_evil -name vm42").as_deref(),
        Some("vm42")
    );
    assert_eq!(
        name("-append -name evil"),
        None,
        "the guest's kernel command line, then a disk image"
    );
    assert_eq!(name("-daemonize -name vm42").as_deref(), Some("vm42"));
    assert_eq!(name("-enable-kvm -snapshot -name vm42").as_deref(), Some("vm42"));
}

#[test]
fn a_qmp_socket_is_found_in_every_spelling() {
    for line in [
        "-qmp unix:/q,server=on,wait=off",
        "-qmp unix:/q,server,nowait",
        "--qmp unix:/q,server",
        "-qmp-pretty unix:/q,server=on,wait=off",
        "-chardev socket,id=m0,path=/q,server=on,wait=off -mon chardev=m0,mode=control",
        "-mon chardev=m0,mode=control -chardev socket,id=m0,path=/q,server=on,wait=off",
        "-chardev socket,id=m0,path=/q,server,nowait -mon m0,mode=control",
        "-chardev socket,path=/q,server=on,id=m0 -mon mode=control,pretty=on,chardev=m0",
        "-chardev socket,id=m0,path=/q,server=on -mon id=x,chardev=m0,mode=control",
        "-chardev socket,id=m0,path=/q,server=on -qmp chardev:m0",
    ] {
        assert_eq!(monitors(line), [unix("/q")], "{line}");
    }
}

#[test]
fn a_monitor_for_people_is_no_qmp() {
    for line in [
        "-monitor unix:/q,server=on,wait=off",
        "-monitor none",
        "-chardev socket,id=m0,path=/q,server=on -mon chardev=m0",
        "-chardev socket,id=m0,path=/q,server=on -mon m0,mode=readline",
        "-chardev socket,id=m0,path=/q,server=on -monitor chardev:m0",
        "-chardev socket,id=m0,path=/q,server=on -device virtserialport,chardev=m0",
        "-serial unix:/q,server=on -gdb unix:/q,server=on",
    ] {
        assert_eq!(monitors(line), [], "{line}");
    }
}

#[test]
fn monitors_keep_their_order_and_do_not_mix() {
    let line = "-monitor unix:/h,server -qmp unix:/a,server -mon c,mode=control -qmp-pretty tcp:h:1,server \
                -chardev socket,id=c,path=/c,server=on";
    assert_eq!(monitors(line), [unix("/a"), unix("/c"), QmpAddress::Tcp("h:1".into())]);
}

fn monitor(address: QmpAddress, libvirt: bool) -> Monitor {
    Monitor {
        address,
        libvirt,
        pretty: false,
    }
}

#[test]
fn pretty_monitors_are_marked_and_come_last() {
    let line =
        parse("qemu -qmp-pretty unix:/p,server -chardev socket,id=c,path=/c,server -mon c,mode=control,pretty=on");
    assert!(line.monitors.iter().all(|monitor| monitor.pretty));
    let pretty = QmpSocket {
        pretty: true,
        ..listening("/p")
    };
    let found = domain(None, 1, vec![pretty, listening("/a"), listening("/b")]);
    assert_eq!(found.qmp_paths().collect::<Vec<_>>(), ["/a", "/b", "/p"].map(Path::new));
}

#[test]
fn options_of_a_configuration_file_count_where_it_is_named() {
    let text = b"[name]\nguest = \"vm42\"\n[chardev \"c\"]\nbackend = \"socket\"\npath = \"/c\"\nserver = \"on\"\n\
                 [mon]\nchardev = \"c\"\nmode = \"control\"\n";
    let parse = |line: &str| {
        let read = |path: &Path| (path == Path::new("/vm.conf")).then(|| text.to_vec());
        CommandLine::parse(line.split(' ').map(str::as_bytes), &read)
    };
    let line = parse("qemu -name a -readconfig /vm.conf -S");
    assert_eq!(
        (line.name.as_deref(), line.monitors),
        (Some("vm42"), vec![monitor(unix("/c"), false)])
    );
    assert_eq!(line.configs, [Path::new("/vm.conf")]);
    assert_eq!(parse("qemu -readconfig /vm.conf -name a").name.as_deref(), Some("a"));
    let other = parse("qemu -readconfig /other.conf -mon c,mode=control");
    assert_eq!((other.name, other.monitors), (None, vec![]));
}

/// As libvirt 9 starts a guest, shortened.
#[test]
fn libvirts_monitor_is_marked_and_one_beside_it_is_not() {
    let own = "/usr/bin/qemu-system-x86_64 -name guest=vm42,debug-threads=on -S \
               -uuid 8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f60 -no-user-config -nodefaults \
               -chardev socket,id=charmonitor,fd=24,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control";
    let fd = monitor(QmpAddress::Descriptor("24".into()), true);
    let line = parse(own);
    assert_eq!(line.monitors, std::slice::from_ref(&fd));
    assert_eq!(line.name.as_deref(), Some("vm42"));
    assert_eq!(line.uuid.as_deref(), Some("8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f60"));
    let beside = parse(&format!("{own} -qmp unix:/run/vmpatch.sock,server=on,wait=off"));
    let added = monitor(unix("/run/vmpatch.sock"), false);
    assert_eq!(beside.monitors, [fd, added]);
    let old = parse("qemu -chardev socket,id=charmonitor,path=/m,server,nowait -mon charmonitor,mode=control");
    assert_eq!(old.monitors, [monitor(unix("/m"), true)]);
}

#[test]
fn what_moves_a_process_from_its_folder_is_seen() {
    let seen = |line: &str| {
        let line = parse(&format!("qemu {line}"));
        (line.daemonized, line.chrooted)
    };
    assert_eq!(seen("-daemonize"), (true, false));
    assert_eq!(seen("-chroot /var/empty"), (false, true));
    assert_eq!(seen("-run-with chroot=/var/empty,user=nobody"), (false, true));
    assert_eq!(seen("-run-with async-teardown=on -append -daemonize"), (false, false));
}

fn domain(name: Option<&str>, pid: i32, qmp: Vec<QmpSocket>) -> Domain {
    Domain {
        name: name.map(str::to_owned),
        uuid: None,
        pid,
        start_time: 1,
        binary: None,
        qmp,
        unread: vec![],
    }
}

fn listening(path: &str) -> QmpSocket {
    QmpSocket {
        address: unix(path),
        libvirt: false,
        pretty: false,
        path: Some(PathBuf::from(path)),
    }
}

fn unreachable(address: QmpAddress, libvirt: bool) -> QmpSocket {
    QmpSocket {
        address,
        libvirt,
        pretty: false,
        path: None,
    }
}

fn domains(domains: Vec<Domain>) -> Domains {
    Domains {
        found: domains,
        ..Domains::default()
    }
}

#[test]
fn the_one_domain_of_a_name_is_found() {
    let all = domains(vec![
        domain(Some("vm1"), 1, vec![]),
        domain(
            Some("vm42"),
            2,
            vec![unreachable(QmpAddress::Tcp("h:1".into()), false), listening("/q")],
        ),
        domain(None, 3, vec![]),
    ]);
    let found = all.find("vm42").unwrap();
    assert_eq!((found.pid, found.qmp_socket().unwrap()), (2, PathBuf::from("/q")));
}

#[test]
fn a_name_that_nobody_has_is_answered_with_those_that_run() {
    let all = domains(vec![domain(Some("vm1"), 1, vec![]), domain(None, 3, vec![])]);
    let message = all.find("vm42").unwrap_err().to_string();
    assert_eq!(
        message,
        "no running QEMU has the name `vm42`: running are vm1, pid 3 without a name"
    );
    let hidden = Domains {
        unreadable: 7,
        ..Domains::default()
    };
    let message = hidden.find("vm42").unwrap_err().to_string();
    assert_eq!(
        message,
        "no running QEMU has the name `vm42`: none is running; \
         7 processes of other users could not be looked at: run vmpatch as root"
    );
    let hidden = Domains {
        hidden: true,
        ..Domains::default()
    };
    let message = hidden.find("vm42").unwrap_err().to_string();
    assert!(
        message.ends_with("none is running; processes of other users do not show: run vmpatch as root"),
        "{message}"
    );
    let many = domains((0..300).map(|pid| domain(Some("vm"), pid, vec![])).collect());
    assert!(
        many.find("vm42")
            .unwrap_err()
            .to_string()
            .ends_with("vm, vm and 280 more")
    );
}

#[test]
fn two_of_one_name_are_named_with_their_sockets() {
    let all = domains(vec![
        domain(Some("vm42"), 1, vec![listening("/a")]),
        domain(Some("vm42"), 2, vec![]),
    ]);
    let error = all.find("vm42").unwrap_err();
    assert!(matches!(&error, DomainError::SeveralOfThatName { pids, .. } if *pids == [1, 2]));
    assert_eq!(
        error.to_string(),
        "2 running QEMUs have the name `vm42`: pid 1 at /a, pid 2 without a usable QMP socket; \
         choose one with --qmp SOCKET"
    );
}

#[test]
fn a_domain_without_a_usable_socket_says_what_it_has() {
    let find = |qmp| domains(vec![domain(Some("vm42"), 7, qmp)]).find("vm42").unwrap_err();
    let none = find(vec![]);
    assert_eq!(
        none.to_string(),
        "domain `vm42` (pid 7) has no QMP socket that vmpatch can connect to (it has no QMP monitor); \
         start it with `-qmp unix:PATH,server=on,wait=off`"
    );
    let tcp = find(vec![unreachable(QmpAddress::Tcp("127.0.0.1:4444".into()), false)]);
    assert!(tcp.to_string().contains("(it has tcp:127.0.0.1:4444)"), "{tcp}");
    let fd = || QmpAddress::Descriptor("24".into());
    let libvirt = find(vec![unreachable(fd(), true)]);
    assert!(matches!(&libvirt, DomainError::OnlyLibvirts { .. }), "{libvirt}");
    assert!(libvirt.to_string().contains("managed by libvirt"), "{libvirt}");
    let held = find(vec![QmpSocket {
        libvirt: true,
        ..listening("/var/lib/libvirt/qemu/m")
    }]);
    assert!(matches!(&held, DomainError::OnlyLibvirts { .. }), "{held}");
    let unread = Domain {
        unread: vec![PathBuf::from("/etc/vm42.conf")],
        ..domain(Some("vm42"), 7, vec![])
    };
    let unread = domains(vec![unread]).find("vm42").unwrap_err();
    assert!(
        unread
            .to_string()
            .contains("(it has no QMP monitor; not read: /etc/vm42.conf)"),
        "{unread}"
    );
    let other = find(vec![unreachable(fd(), false)]);
    assert!(other.to_string().contains("(it has descriptor 24)"), "{other}");
}
