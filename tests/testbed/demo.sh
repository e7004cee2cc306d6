#!/bin/sh
# What `cargo xtask demo` shows, once everything is built: a container in a microVM under a private containerd.
# It runs in the nested testbed or directly on a machine, and finds all it needs in NACRE_* variables.
set -eu

say() { printf '\n==> %s\n' "$*"; }

work=$(mktemp -d "${TMPDIR:-/tmp}/nacre-demo.XXXXXX")
socket=$work/containerd.sock
daemon=
PATH=$NACRE_CONTAINERD_2_1:$NACRE_BIN:$PATH
export PATH

finish() {
    code=$?
    trap - EXIT INT TERM
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    [ "$code" -eq 0 ] || { echo "the end of containerd's log:"; tail -n 25 "$NACRE_OUT/containerd.log" 2>/dev/null || true; }
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

say "can this host run guests?"
vmctl doctor

say "a private containerd: own root, state and socket"
cat > "$work/config.toml" <<END
version = 2
root = "$work/root"
state = "$work/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime"]
[grpc]
  address = "$socket"
END
containerd --config "$work/config.toml" > "$NACRE_OUT/containerd.log" 2>&1 &
daemon=$!
tries=0
until ctr --address "$socket" version > /dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 150 ] || { echo "containerd did not come up"; exit 1; }
    sleep 0.2
done
containerd --version
ctr --address "$socket" images import "$NACRE_TEST_IMAGE" > /dev/null
echo "imported $NACRE_TEST_IMAGE_REF, made on the spot from busybox"

say "ctr run --rm --runtime io.containerd.nacre.v1 $NACRE_TEST_IMAGE_REF"
echo "host's kernel:  $(uname -r)"
ctr --address "$socket" run --rm --runtime io.containerd.nacre.v1 "$NACRE_TEST_IMAGE_REF" demo sh -c '
    echo "guest'"'"'s kernel: $(uname -r)"
    echo "in the guest:   $(grep -c ^processor /proc/cpuinfo) CPU, $(($(sed -n "s/MemTotal: *\([0-9]*\) kB/\1/p" /proc/meminfo) / 1024)) MiB, PID $$"
    exit 42' && code=0 || code=$?
echo "exit code:      $code (the container said 42)"
[ "$code" -eq 42 ]

say "where the time of a boot goes"
vmctl boot --timing

say "what is left behind"
left=0
for name in containerd-shim-nacre-v1 vmctl; do
    for process in /proc/[0-9]*; do
        [ "$(cat "$process/comm" 2>/dev/null)" = "$(printf %.15s "$name")" ] || continue
        echo "process left: ${process#/proc/} $name"
        left=1
    done
done
if grep -e /run/nacre -e "$work" /proc/mounts; then left=1; fi
if [ -d /run/nacre/vms ] && [ -n "$(ls -A /run/nacre/vms)" ]; then ls -l /run/nacre/vms; left=1; fi
[ "$left" -eq 0 ] && echo "no process, no mount, no state"
exit "$left"
