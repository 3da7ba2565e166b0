#!/bin/bash
# A job of Slurm that goes on after each preemption and each time limit, until its run is finished.
#
#   sbatch --export=ALL tools/slurm.sh mgdarts search --preset small --out runs/small --requeue
#   sbatch tools/slurm.sh mgdarts train runs/small --requeue
#   sbatch --gpus=4 tools/slurm.sh torchrun --nproc-per-node 4 --signals-to-handle SIGTERM,SIGUSR1,SIGUSR2 \
#       -m mgdarts search --preset small --out runs/small --requeue
#
# 90 seconds before the time limit, or when a job of higher priority needs the node, Slurm sends SIGUSR1 or SIGTERM to
# this shell (B:), which hands it to the command. The command ends its step, saves its state and exits with 75; this
# shell then asks for a requeue. torchrun hands signals on, too, and ends with a code of its own: whatever it is, after
# a signal that is a reason for a requeue. Adapt the lines below, or give them to sbatch.
#SBATCH --job-name=mgdarts
#SBATCH --time=04:00:00
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --signal=B:USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
most=${MGDARTS_REQUEUES:-100} # a run that is preempted more often than that should be looked at
pid=""
told=0 # whether a signal has asked for an end
hand_on() { told=1; [ -n "$pid" ] && kill -s "$1" "$pid" 2>/dev/null; }
trap 'hand_on USR1' USR1
trap 'hand_on USR2' USR2
trap 'hand_on TERM' TERM

"$@" &
pid=$!
while :; do # a trapped signal ends `wait`, not the command
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
done
if [ "$code" -gt 128 ]; then # perhaps that of the signal, and the command ended in the same moment
    wait "$pid" 2>/dev/null
    last=$?
    [ "$last" -ne 127 ] && code=$last
fi
if [ "$code" -eq 75 ] || { [ "$told" -eq 1 ] && [ "$code" -ne 0 ] && [ "$code" -ne 2 ]; }; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
        echo "slurm.sh: requeued $most times already: not again" >&2
    else
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        echo "slurm.sh: the requeue was refused; sbatch the same command again to go on" >&2
    fi
fi
exit "$code"
