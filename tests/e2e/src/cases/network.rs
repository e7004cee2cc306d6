//! The guest is on the network that CNI made: by vmctl, by a containerd's own way of CNI, and in a namespace that others
//! have filled.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::calls::One;
use crate::context::{Context, Runtime};
use crate::ctr::{self, Ctr, expect_words};
use crate::net::{self, Named, Network, PROBE, Served, Wanted};
use crate::poll;
use crate::shell::{Kernel, Shell};
use crate::shim::Bundle;
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "network: guest and host reach each other over TCP, UDP and ICMP in both families",
        subject: Subject::Alone,
        seconds: (180, 1800),
        run: both_ways,
    },
    Case {
        name: "network: two guests reach each other, and a published port leads to one",
        subject: Subject::Alone,
        seconds: (180, 180),
        run: two_guests,
    },
    Case {
        name: "network: an MTU of 1400 and one of 9000 are the guest's",
        subject: Subject::Alone,
        seconds: (240, 240),
        run: mtus,
    },
    Case {
        name: "network: on Linux 6.12 it is the same",
        subject: Subject::Alone,
        seconds: (180, 180),
        run: newer_kernel,
    },
    Case {
        name: "network: what cannot be is said in words, and nothing is left",
        subject: Subject::Alone,
        seconds: (180, 180),
        run: refusals,
    },
    Case {
        name: "network: a shim that is killed leaves nothing once delete has run",
        subject: Subject::Alone,
        seconds: (120, 120),
        run: killed,
    },
    Case {
        name: "network: containers of `ctr run --cni`, one after another, leave nothing",
        subject: Subject::Agreed,
        seconds: (180, 1200),
        run: one_after_another,
    },
    Case {
        name: "network: two interfaces of a namespace are the container's, and a link goes down and comes back",
        subject: Subject::Agreed,
        seconds: (180, 180),
        run: two_interfaces,
    },
    Case {
        name: "network: a namespace that nobody fills has loopback only",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: empty,
    },
];

const PORT: u16 = 5087;

/// A shell with this network.
fn shell<'a>(
    context: &'a Context,
    name: &str,
    kernel: Kernel,
    network: &Network,
    options: &[&str],
) -> Result<Shell<'a>> {
    let list = network.list.display().to_string();
    let mut all = vec!["--net", &list, "--volume", "/usr/local/bin:/probe:ro"];
    all.extend(options);
    let mut shell = Shell::launch(context, name, kernel, &all, &network.config())?;
    shell.tell("echo ready").context("the shell's beginning")?;
    Ok(shell)
}

/// The guest's address on `eth0`.
fn address(shell: &mut Shell<'_>, six: bool) -> Result<IpAddr> {
    let family = if six { "-6" } else { "-4" };
    let text = shell.tell(&format!("ip {family} -o addr show dev eth0 scope global"))?;
    let word = text.split_whitespace().find(|word| word.contains('/'));
    let word = word.and_then(|word| word.split_once('/'));
    let (address, _) = word.with_context(|| format!("no address in {text:?}"))?;
    Ok(address.parse()?)
}

fn both_ways(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    let mut guest = shell(context, "both", Kernel::Usual, &network, &[])?;
    guest.tell("ip addr; ip route; ip -6 route; cat /etc/resolv.conf /etc/hosts /etc/hostname")?;
    reach(&mut guest, &network)?;
    names(&mut guest)?;

    // Much, and at once.
    let megabytes = context.times(64, 1024);
    let _served = Served::start(PORT)?;
    let host = network.host(false);
    let much = format!("--bytes {}", u64::from(megabytes) << 20);
    for what in ["send", "receive"] {
        let words = net::words(what, host, PORT, &much);
        guest.tell(&format!("{PROBE} {words}"))?;
    }
    for what in ["send", "receive"] {
        let words = net::words(what, host, PORT, "--bytes 262144 --streams 64");
        guest.tell(&format!("{PROBE} {words}"))?;
    }
    guest.end()?;
    network.expect_nothing_left(context.seconds(10))
}

/// TCP, UDP and ICMP in both families, both ways.
fn reach(guest: &mut Shell<'_>, network: &Network) -> Result<()> {
    let _served = Served::start(PORT)?;
    guest.tell(&format!(
        "{PROBE} net serve --port {PORT} > /tmp/served & until [ -s /tmp/served ]; do usleep 50000; done"
    ))?;
    for six in [false, true] {
        let host = network.host(six);
        let own = address(guest, six)?;
        let ping = if six { "ping6" } else { "ping" };
        guest.tell(&format!("{ping} -c 3 -W 5 {host}"))?;
        ctr::run(Command::new(ping).args(["-c", "3", "-W", "5", &own.to_string()]))?
            .expect_code(0)?;
        for (what, options) in [
            ("send", "--bytes 1048576"),
            ("receive", "--bytes 1048576"),
            ("ask", "--count 20 --size 1000"),
            ("ask", "--count 20 --size 1000 --udp"),
        ] {
            let words = net::words(what, host, PORT, options);
            guest.tell(&format!("{PROBE} {words}"))?;
            net::probe_here(&net::words(what, own, PORT, options))?;
        }
    }
    guest.tell("kill %1; wait")?;
    Ok(())
}

/// What programs find of names.
fn names(guest: &mut Shell<'_>) -> Result<()> {
    let resolv = guest.tell("cat /etc/resolv.conf")?;
    expect_words(&resolv, &["nameserver 10.87.61.1", "search e2e.test"])?;
    let own = address(guest, false)?.to_string();
    let name = guest.tell("hostname")?;
    ensure!(
        guest.tell("cat /etc/hostname")? == name,
        "/etc/hostname is not {name}"
    );
    let hosts = guest.tell("cat /etc/hosts")?;
    ensure!(
        hosts
            .lines()
            .any(|line| line.split_whitespace().eq([own.as_str(), name.as_str()])),
        "{own} is not {name} in {hosts}"
    );
    Ok(())
}

fn two_guests(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    let publish = ["--publish", "8087:5088", "--publish", "8088:5088/udp"];
    let mut server = shell(context, "server", Kernel::Usual, &network, &publish)?;
    let mut client = shell(context, "client", Kernel::Usual, &network, &[])?;
    server.tell(&format!(
        "{PROBE} net serve --port 5088 > /tmp/served & until [ -s /tmp/served ]; do usleep 50000; done"
    ))?;
    for six in [false, true] {
        let to = address(&mut server, six)?;
        for (what, options) in [
            ("send", "--bytes 4194304"),
            ("receive", "--bytes 4194304"),
            ("ask", "--count 20 --size 1400 --udp"),
        ] {
            let words = net::words(what, to, 5088, options);
            client.tell(&format!("{PROBE} {words}"))?;
        }
    }
    // The host's own address, and the other guest by it.
    let host = network.host(false);
    net::probe_here(&net::words("send", host, 8087, "--bytes 1048576"))?;
    net::probe_here(&net::words("ask", host, 8088, "--count 5 --size 100 --udp"))?;
    let words = net::words("receive", host, 8087, "--bytes 1048576");
    client.tell(&format!("{PROBE} {words}"))?;
    client.end()?;
    server.end()?;
    network.expect_nothing_left(context.seconds(10))?;
    let refused = net::probe_here(&net::words("send", host, 8087, "--bytes 1"));
    ensure!(refused.is_err(), "the port is published still");
    Ok(())
}

fn mtus(context: &Context) -> Result<()> {
    for (mtu, name) in [(1400_u16, "small"), (9000, "large")] {
        let wanted = Wanted {
            mtu: Some(mtu),
            ..Wanted::default()
        };
        let network = Network::write(context, &wanted)?;
        let mut guest = shell(context, name, Kernel::Usual, &network, &[])?;
        let has = guest.number("cat /sys/class/net/eth0/mtu")?;
        ensure!(has == u64::from(mtu), "the guest's MTU is {has}");
        // The largest packet that fits, and what it is made of: 20 bytes of IP and 8 of ICMP.
        let host = network.host(false);
        guest.tell(&format!("ping -c 2 -W 5 -s {} {host}", mtu - 28))?;
        let _served = Served::start(PORT)?;
        for what in ["send", "receive"] {
            let words = net::words(what, host, PORT, "--bytes 8388608 --streams 4");
            guest.tell(&format!("{PROBE} {words}"))?;
        }
        guest.end()?;
        network.expect_nothing_left(context.seconds(10))?;
    }
    Ok(())
}

fn newer_kernel(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    let mut guest = shell(context, "newer", Kernel::Newer, &network, &[])?;
    reach(&mut guest, &network)?;
    guest.end()?;
    network.expect_nothing_left(context.seconds(10))
}

fn refusals(context: &Context) -> Result<()> {
    // One address, which the first has.
    let wanted = Wanted {
        addresses: 1,
        ..Wanted::default()
    };
    let network = Network::write(context, &wanted)?;
    let first = shell(context, "first", Kernel::Usual, &network, &[])?;
    let second = fails(context, "second", &network, &[], &network.config())?;
    let words = [
        "no IP addresses available",
        "\"e2e\"",
        "enlarge",
        "10-e2e.conflist",
    ];
    expect_words(&second, &words)?;
    first.end()?;

    let other = network
        .config()
        .replace("cni_bin_dirs = [", "cni_bin_dirs = [\"/nowhere\"]\n#");
    let missing = fails(context, "missing", &network, &[], &other)?;
    expect_words(&missing, &["bridge", "/nowhere"])?;

    let without = format!(
        "cmdline = \"module_blacklist=virtio_net\"\n{}",
        network.config()
    );
    let driverless = fails(context, "driverless", &network, &[], &without)?;
    expect_words(&driverless, &["virtio_net"])?;
    network.expect_nothing_left(context.seconds(10))?;

    let text = std::fs::read_to_string(&network.list)?;
    std::fs::write(&network.list, &text[..text.len() / 2])?;
    let broken = fails(context, "broken", &network, &[], &network.config())?;
    expect_words(&broken, &["10-e2e.conflist"])?;
    network.expect_nothing_left(context.seconds(10))
}

/// What `vmctl run` with this network says when it fails.
fn fails(
    context: &Context,
    name: &str,
    network: &Network,
    options: &[&str],
    config: &str,
) -> Result<String> {
    let list = network.list.display().to_string();
    let mut all = vec!["--net", &list];
    all.extend(options);
    let mut shell = Shell::launch(context, name, Kernel::Usual, &all, config)?;
    let ended = poll::until("the end of vmctl run", context.seconds(60), || {
        shell.ended()
    })?;
    ensure!(ended.contains("125"), "vmctl run ended with {ended}");
    Ok(shell.errors())
}

fn killed(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    // What containerd gives the containers of CRI: it counts in the network namespace.
    let script =
        "[ \"$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)\" = 7 ] || exit 9; sleep 1000";
    let mut bundle = Bundle::script(context, "killed", script)?;
    let file = bundle.folder.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    spec["linux"]["sysctl"] = serde_json::json!({ "net.ipv4.ip_unprivileged_port_start": "7" });
    std::fs::write(&file, serde_json::to_vec(&spec)?)?;
    let config = context.path("nacre.toml");
    std::fs::write(&config, network.config())?;
    bundle
        .environment
        .push(("NACRE_CONFIG", config.display().to_string()));
    let one = One::of(context, bundle)?;
    one.tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default())?;
    ensure!(network.leases().is_empty(), "Create sets up the network");
    one.tasks.start(one.id(), "")?;
    let leases = network.leases();
    ensure!(leases.len() == 2, "the leases are {leases:?}");
    ensure!(
        net::ports_of_bridge().len() == 1,
        "nothing is on the bridge"
    );
    std::thread::sleep(std::time::Duration::from_secs(1));
    let state = one.tasks.state(one.id(), "")?;
    ensure!(
        state.exit_status == 0 && state.exited_at.is_none(),
        "the container has ended: {state}"
    );
    one.bundle.kill()?;
    ensure!(
        network.leases() == leases,
        "a killed shim has given its addresses back"
    );
    one.bundle.delete()?;
    network.expect_nothing_left(context.seconds(5))
}

fn one_after_another(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    let ctr = Ctr::new(context)?;
    // Where `ctr run --cni` looks.
    let place = std::path::Path::new("/etc/cni/net.d");
    std::fs::create_dir_all(place)?;
    let list = place.join("10-e2e.conflist");
    std::fs::copy(&network.list, &list)?;
    let ran = (|| {
        let _served = Served::start(PORT)?;
        for number in 0..context.times(3, 20) {
            let words = net::words("send", network.host(false), PORT, "--bytes 100000");
            let six = net::words("receive", network.host(true), PORT, "--bytes 100000");
            let script = format!(
                "ip addr show dev eth0 && {PROBE} {words} && {PROBE} {six} && ping -c 1 {}",
                network.host(false)
            );
            let flags = [
                "--cni",
                "--mount",
                "type=bind,src=/usr/local/bin,dst=/probe,options=rbind:ro",
            ];
            let id = context.id(&format!("cni{number}"));
            ctr.script(&id, &flags, &script)?
                .expect_code(0)
                .with_context(|| format!("container {number}"))?;
            network
                .expect_nothing_left(context.seconds(10))
                .with_context(|| format!("after container {number}"))?;
        }
        Ok(())
    })();
    std::fs::remove_file(&list)?;
    ran
}

fn two_interfaces(context: &Context) -> Result<()> {
    let network = Network::write(context, &Wanted::default())?;
    let ctr = Ctr::new(context)?;
    let named = Named::make(&context.id("two"))?;
    let id = context.id("two");
    let first = network.attach(&id, "eth0", &named.path)?;
    let ports = net::ports_of_bridge();
    let second = network.attach(&id, "net1", &named.path)?;
    let port = net::ports_of_bridge()
        .into_iter()
        .find(|port| !ports.contains(port))
        .context("the second interface is on no bridge")?;
    let before = named.interfaces()?;
    let with = format!("network:{}", named.path.display());
    ctr.detached(&id, &["--with-ns", &with], &["sleep", "1000"])?;
    let mut number = 0;
    let mut tell = |script: &str| -> Result<String> {
        number += 1;
        let exec = format!("e{number}");
        let output = ctr.exec(&id, &exec, &[], &["sh", "-c", script])?;
        output.expect_code(0)?;
        Ok(output.out().trim().to_owned())
    };
    let host = network.host(false);
    tell(&format!(
        "ip addr; ip route; ping -c 2 -W 5 {host} && ping -c 2 -W 5 -I net1 {host}"
    ))?;
    for (name, result) in [("eth0", first.result()), ("net1", second.result())] {
        let shown = tell(&format!("ip -o addr show dev {name}"))?;
        for ip in result.iter().flat_map(|result| &result.ips) {
            let address = format!(" {}/{} ", ip.address, ip.prefix);
            ensure!(shown.contains(&address), "{address} is not in {shown}");
        }
    }
    let carrier = |tell: &mut dyn FnMut(&str) -> Result<String>, expected: &str| {
        poll::until("the link's new state", context.seconds(10), || {
            let now = tell("cat /sys/class/net/net1/carrier")?;
            Ok((now == expected).then_some(()))
        })
    };
    carrier(&mut tell, "1")?;
    for (set, expected) in [("down", "0"), ("up", "1")] {
        ctr::run(Command::new("ip").args(["link", "set", &port, set]))?.expect_code(0)?;
        carrier(&mut tell, expected)?;
    }
    poll::until("an answer over the link", context.seconds(20), || {
        let again = tell(&format!("ping -c 1 -W 2 -I net1 {host}"));
        Ok(again.is_ok().then_some(()))
    })?;
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    ctr.remove(&id)?;
    poll::until("the namespace as it was", context.seconds(10), || {
        Ok((named.interfaces()? == before).then_some(()))
    })?;
    second.check().context("what CNI made is not as it was")?;
    second.del()?;
    first.check().context("what CNI made is not as it was")?;
    first.del()?;
    network.expect_nothing_left(context.seconds(10))
}

fn empty(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let script = "ls /sys/class/net; ip -o link; ping -c 1 127.0.0.1";
    let output = ctr.script(&context.id("empty"), &[], script)?;
    // runc leaves it down.
    if context.runtime == Runtime::Nacre {
        output.expect_code(0)?;
    }
    let text = output.out();
    let mut interfaces = text.lines().take_while(|line| !line.contains(": "));
    ensure!(
        interfaces.all(|line| ["lo", "sit0", "ip6tnl0", "tunl0"].contains(&line)),
        "there is more than loopback: {text}"
    );
    Ok(())
}
