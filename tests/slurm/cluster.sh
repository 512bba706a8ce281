#!/usr/bin/env bash
# A private Slurm of two nodes on this host, for tests: cluster.sh up|down [--purge]. Listens on loopback alone.
#   SP_DIR   state, logs, sockets and process numbers   SP_PORT   the first of its ports
# Needs slurmctld, slurmd, slurm-client and munge. Touches nothing outside SP_DIR; ends only processes of its own.
set -euo pipefail
D=$SP_DIR; N=2; CPUS=4
BASE=$SP_PORT
export SLURM_CONF=$D/etc/slurm.conf
H=$(hostname -s)

# a killed daemon can stay a zombie for seconds (pid 1 here is no real init): a zombie is not alive
running() { grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status" && grep -qsE '^Name:[[:space:]]*(slurm|munge)' "/proc/$1/status"; }
alive() { [ -s "$1" ] && running "$(cat "$1")"; }

write_conf() {
  mkdir -p "$D"/{etc,run,log,state,spool}
  # cred_expire: a requeued job waits that long, where StartTime is set to now
  cat > "$SLURM_CONF" <<CONF
ClusterName=sptest
SlurmctldHost=$H(127.0.0.1)
SlurmctldPort=$BASE
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=3
MinJobAge=600
CompleteWait=0
SlurmctldTimeout=30
SlurmdTimeout=60
MailProg=/bin/true
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
PropagateResourceLimits=NONE
NodeName=n[1-$N] NodeHostname=$H NodeAddr=127.0.0.1 Port=[$((BASE+1))-$((BASE+N))] CPUs=$CPUS RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10
PartitionName=spot Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
CONF
}

start_ctld() { /usr/sbin/slurmctld -c || true; sleep 0.05; }
up() {
  write_conf
  if ! alive "$D/run/munged.pid"; then
    [ -s "$D/etc/munge.key" ] || (umask 077; head -c 128 /dev/urandom > "$D/etc/munge.key")
    chmod 600 "$D/etc/munge.key"; rm -f "$D/run/munge.sock"*
    /usr/sbin/munged --key-file="$D/etc/munge.key" --socket="$D/run/munge.sock" --pid-file="$D/run/munged.pid" \
      --log-file="$D/log/munged.log" --seed-file="$D/run/munged.seed" --num-threads=2
  fi
  alive "$D/run/slurmctld.pid" || start_ctld
  for i in $(seq 1 "$N"); do
    mkdir -p "$D/spool/n$i"
    alive "$D/run/slurmd.n$i.pid" || /usr/sbin/slurmd -N "n$i"
  done
  local end=$((SECONDS+20))
  while [ $SECONDS -lt $end ]; do
    [ "$(timeout 2 sinfo -h -N -t idle,alloc,mix -o %N 2>/dev/null | sort -u | wc -l)" = "$N" ] && { sinfo; return 0; }
    alive "$D/run/slurmctld.pid" || start_ctld   # after kill -9 the old slurmscriptd child can hold the port for a moment
    sleep 0.1
  done
  echo "cluster not ready; see $D/log" >&2; sinfo -R >&2 || true; return 1
}

down() {
  if alive "$D/run/slurmctld.pid"; then timeout 5 scancel -u "$(id -un)" 2>/dev/null || true
  for _ in $(seq 1 50); do [ -z "$(timeout 2 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done; fi
  local pids=() f p
  for f in "$D"/run/slurmd.*.pid "$D/run/slurmctld.pid"; do alive "$f" && pids+=("$(cat "$f")"); done
  alive "$D/run/munged.pid" && pids+=("$(cat "$D/run/munged.pid")")
  [ ${#pids[@]} -gt 0 ] && kill "${pids[@]}" 2>/dev/null || true
  for p in ${pids[@]+"${pids[@]}"}; do
    for _ in $(seq 1 100); do running "$p" || continue 2; sleep 0.05; done
    kill -9 "$p" 2>/dev/null || true
  done
  # leftovers of a crashed slurmd: stepds and job processes carry our SLURM_CONF in their environment
  local e
  for f in /proc/[0-9]*; do
    e=$({ tr '\0' '\n' < "$f/environ"; } 2>/dev/null) || continue
    grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$e" || continue
    if grep -q '^SLURM_JOB_ID=' <<<"$e" || [ "$(readlink "$f/exe")" = /usr/sbin/slurmstepd-wlm ]; then
      kill -9 "${f#/proc/}" 2>/dev/null || true; fi
  done
  [ "${1:-}" = --purge ] && rm -rf "$D" || true
}
case "${1:-}" in
  up) up ;;
  down) down "${2:-}" ;;
  *) echo "usage: $0 up|down [--purge]" >&2; exit 2 ;;
esac
