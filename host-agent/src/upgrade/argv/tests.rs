use super::{Context, Refused, Rewritten, Tap, rewrite};
use std::path::PathBuf;

fn context() -> Context {
    Context {
        machine: "pc-q35-7.2".to_owned(),
        old_program: PathBuf::from("/opt/old/bin/qemu-system-x86_64"),
        new_program: PathBuf::from("/usr/bin/qemu-system-x86_64"),
        data: Vec::new(),
        taps: vec![Tap {
            interface: "tap7".to_owned(),
            descriptor: 31,
        }],
        generation: Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".to_owned()),
    }
}

fn try_line(line: &str) -> Result<Rewritten, Refused> {
    let words: Vec<Vec<u8>> = line.split(' ').map(|word| word.as_bytes().to_vec()).collect();
    rewrite(&words, &context())
}

fn line(text: &str) -> String {
    let words = try_line(text).unwrap().words;
    let words: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
    words.join(" ")
}

fn refused(text: &str) -> String {
    try_line(text).unwrap_err().to_string()
}

#[test]
fn the_machine_type_is_pinned_to_what_runs() {
    assert_eq!(line("q -M q35,accel=tcg -m 1G"), "-M type=pc-q35-7.2,accel=tcg -m 1G");
    assert_eq!(
        line("q -machine accel=tcg -machine q35"),
        "-machine accel=tcg -machine type=pc-q35-7.2"
    );
    assert_eq!(line("q -m 1G"), "-m 1G -machine type=pc-q35-7.2");
}

#[test]
fn what_says_how_the_guest_began_is_left_out() {
    assert_eq!(
        line("q -M q35 -S -daemonize -incoming defer -loadvm x -no-reboot"),
        "-M type=pc-q35-7.2 -no-reboot"
    );
}

#[test]
fn server_sockets_get_temporary_names_and_wait_for_nobody() {
    let words = "q -M q35 -qmp unix:/q.sock,server,nowait -serial mon:unix:/s,server=on -vnc unix:/v,password=on \
                 -chardev socket,id=a,path=/c~vmpatch,server=on -pidfile /p -gdb unix:/g,server=on,wait=off";
    assert_eq!(
        line(words),
        "-M type=pc-q35-7.2 -qmp unix:path=/q.sock~vmpatch,server=on,wait=off \
         -serial mon:unix:path=/s~vmpatch,server=on,wait=off -vnc unix:/v~vmpatch,password=on \
         -chardev backend=socket,id=a,path=/c~vmpatch,server=on,wait=off -pidfile /p~vmpatch \
         -gdb unix:path=/g~vmpatch,server=on,wait=off"
    );
    let names = try_line(words).unwrap().names;
    let own: Vec<_> = names.iter().map(|name| name.own.to_str().unwrap()).collect();
    assert_eq!(own, ["/q.sock", "/s", "/v", "/c", "/p", "/g"]);
}

#[test]
fn files_that_the_guest_writes_to_are_not_emptied() {
    assert_eq!(
        line("q -M q35 -chardev file,id=c,path=/log -serial file:/con"),
        "-M type=pc-q35-7.2 -chardev backend=file,id=c,path=/log,append=on \
         -chardev backend=file,id=vmpatch-serial-2,path=/con,append=on -serial chardev:vmpatch-serial-2"
    );
    assert_eq!(
        line("q -M q35 -chardev null,id=c,logfile=/log,logappend=off"),
        "-M type=pc-q35-7.2 -chardev backend=null,id=c,logfile=/log,logappend=on"
    );
}

#[test]
fn a_tap_is_inherited_whoever_opened_it() {
    let by_number = try_line("q -netdev tap,id=n,fds=20,vhost=on,vhostfds=22 -add-fd fd=9,set=1").unwrap();
    assert_eq!(by_number.descriptors, [20, 22, 9]);
    for several in ["fds=20:21,vhost=on", "ifname=tap7,queues=2"] {
        assert!(refused(&format!("q -netdev tap,id=n,{several}")).contains("start the guest with one queue"));
    }
    assert_eq!(
        line("q -M q35 -netdev tap,id=n,ifname=tap7,script=no,downscript=no,vhost=on"),
        "-M type=pc-q35-7.2 -netdev type=tap,id=n,vhost=on,fd=31"
    );
    assert!(refused("q -netdev tap,id=n,ifname=tap8").ends_with("the old process does not hold that interface"));
}

#[test]
fn the_new_process_gets_no_rights_to_give_up() {
    assert_eq!(line("q -M q35 -runas qemu"), "-M type=pc-q35-7.2");
    assert_eq!(
        line("q -M q35 -run-with user=qemu,async-teardown=on"),
        "-M type=pc-q35-7.2 -run-with async-teardown=on"
    );
    assert_eq!(line("q -M q35 -run-with user=qemu"), "-M type=pc-q35-7.2");
    assert!(refused("q -chroot /jail").contains("`-chroot /jail`"));
    assert!(refused("q -run-with chroot=/jail").contains("`-run-with chroot=/jail`"));
}

#[test]
fn a_guest_keeps_the_identity_that_was_chosen_for_it() {
    assert_eq!(
        line("q -M q35 -device vmgenid,guid=auto,id=v -device pvpanic"),
        "-M type=pc-q35-7.2 -device driver=vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87,id=v -device pvpanic"
    );
}

#[test]
fn a_client_that_does_not_connect_again_is_refused() {
    assert!(refused("q -netdev stream,id=n,addr.type=unix,addr.path=/p").contains("reconnect"));
    assert!(refused("q -netdev socket,id=n,connect=:1234").contains("the other end is connected"));
    let again = "type=stream,id=n,addr.type=unix,addr.path=/p,reconnect-ms=100";
    assert_eq!(
        line(&format!("q -M q35 -netdev {again}")),
        format!("-M type=pc-q35-7.2 -netdev {again}")
    );
}

#[test]
fn what_lives_in_the_old_process_is_refused_by_name() {
    for (text, option) in [
        ("q -netdev user,id=n", "-netdev user,id=n"),
        (
            "q -netdev {\"type\":\"user\",\"id\":\"n\"}",
            "-netdev {\"type\":\"user\",\"id\":\"n\"}",
        ),
        ("q -nic user", "-nic user"),
        ("q -net user", "-net user"),
        (
            "q -netdev vhost-user,id=n,chardev=c",
            "-netdev vhost-user,id=n,chardev=c",
        ),
        ("q -device vfio-pci,host=01:00.0", "-device vfio-pci,host=01:00.0"),
        (
            "q -device {\"driver\":\"usb-host\"}",
            "-device {\"driver\":\"usb-host\"}",
        ),
        ("q -snapshot", "-snapshot"),
        ("q -drive file=/d,snapshot=on", "-drive file=/d,snapshot=on"),
        ("q -serial stdio", "-serial stdio"),
        ("q -vnc :0", "-vnc :0"),
        ("q -s", "-s"),
        (
            "q -qmp tcp:127.0.0.1:4444,server=on",
            "-qmp tcp:127.0.0.1:4444,server=on",
        ),
        ("q -chardev pty,id=p", "-chardev pty,id=p"),
        ("q -display gtk", "-display gtk"),
        ("q -nographic", "-nographic"),
        ("q -readconfig /c", "-readconfig /c"),
        (
            "q -object filter-dump,id=f,netdev=n,file=/p",
            "-object filter-dump,id=f,netdev=n,file=/p",
        ),
        (
            "q -object {\"qom-type\":\"filter-dump\"}",
            "-object {\"qom-type\":\"filter-dump\"}",
        ),
        ("q -trace x,file=/t", "-trace x,file=/t"),
        ("q -icount auto,rr=record,rrfile=/r", "-icount auto,rr=record,rrfile=/r"),
        ("q -audiodev wav,id=a", "-audiodev wav,id=a"),
    ] {
        assert!(
            refused(text).starts_with(&format!("`{option}` can't be carried over")),
            "{}",
            refused(text)
        );
    }
    assert_eq!(line("q -M q35 -net none"), "-M type=pc-q35-7.2 -net none");
}

#[test]
fn firmware_folders_of_the_old_program_give_way_to_the_new_ones() {
    // /usr/bin exists wherever this runs, /usr/share/no-such-folder nowhere.
    assert_eq!(
        line("q -M q35 -L /opt/old/bin -L /opt/old/share/no-such-folder -L /srv/roms"),
        "-M type=pc-q35-7.2 -L /usr/bin -L /srv/roms"
    );
    let mut context = context();
    context.data = vec![PathBuf::from("/new")];
    let words: Vec<Vec<u8>> = ["q", "-L", "/opt/old/share"]
        .map(|word| word.as_bytes().to_vec())
        .into();
    let found = rewrite(&words, &context).unwrap().words;
    assert_eq!(found, ["-machine", "type=pc-q35-7.2", "-L", "/new"]);
}
