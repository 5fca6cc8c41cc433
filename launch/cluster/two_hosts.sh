#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces joined by a cable (a veth pair), with a torchrun agent in each. The
# second host is lost in the middle of the run and comes back; the run goes on from its last checkpoint. Needs root.
#
#     launch/cluster/two_hosts.sh OUT [options of launch/train.py]
#
# For trying out what a cluster does, and a test of it: all addresses lie in the namespaces made here.
set -euo pipefail
out=$1
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
name=sm3-$$
hosts=("$name-0" "$name-1")
addresses=(10.77.0.1 10.77.0.2)
pids=()

lose() { # a host with all that runs on it
    ip netns pids "$1" | xargs --no-run-if-empty kill -KILL
}
cleanup() {
    for host in "${hosts[@]}"; do
        lose "$host" || true
        ip netns delete "$host" || true
    done 2>/dev/null
}
trap cleanup EXIT

ip netns add "${hosts[0]}"
ip netns add "${hosts[1]}"
ip link add cable netns "${hosts[0]}" type veth peer name cable netns "${hosts[1]}"
for k in 0 1; do
    ip -n "${hosts[k]}" address add "${addresses[k]}/30" dev cable
    ip -n "${hosts[k]}" link set cable up
    ip -n "${hosts[k]}" link set lo up
done

agent() { # the agent of host $1; both hosts have one name, so it is told whether it is the first
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 GLOO_SOCKET_IFNAME=cable ip netns exec "${hosts[$1]}" \
        torchrun --nnodes 2 --nproc-per-node 1 --max-restarts 10 --local-addr "${addresses[$1]}" \
        --rdzv-backend c10d --rdzv-endpoint "${addresses[0]}:29400" --rdzv-id two-hosts \
        --rdzv-conf "is_host=$((1 - $1))" \
        "$root/launch/train.py" --device cpu --out "$out" --checkpoint-every 5 --resume auto "${@:2}" &
    pids[$1]=$!
}

agent 0 "$@"
agent 1 "$@"
until compgen -G "$out/checkpoints/step-*/manifest.json" >/dev/null; do
    kill -0 "${pids[0]}" 2>/dev/null || { echo "the run ended before its first checkpoint" >&2; exit 1; }
    sleep 0.2
done
echo "--- host 1 is lost"
lose "${hosts[1]}"
wait "${pids[1]}" || true
sleep 5
echo "--- host 1 is back"
agent 1 "$@"
wait "${pids[0]}"
wait "${pids[1]}"
