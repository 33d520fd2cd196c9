# Sourced by the batch scripts beside it: goes to the checkout, finds the place where the processes meet, and gives
# run_step, which runs the training step and has SLURM queue the job again when the run must stop early.
#
# Who signals whom:
# - `#SBATCH --signal=B:USR1@180` sends USR1 to the batch script alone, 180 s before the time limit, and before a
#   pre-emption where the cluster has PreemptParameters=send_user_signal.
# - The script hands it on as one SIGTERM to every task: celltron ends its training step, saves and leaves. It does so
#   with scancel, since srun answers a SIGTERM by killing its tasks.
# - SIGTERM reaches the script itself at a pre-emption and at `scancel JOB`. It is handed on, and the job queued again,
#   only where SLURM is not ending the job by itself.

# Seconds that a run has for saving: more than its loop.stop_seconds and torchrun's --shutdown-timeout, and fewer than
# in --signal=B:USR1@..., which leaves time to queue the job again.
STOP_SECONDS=${STOP_SECONDS:-150}
# Times that one job is queued again, so that a job that gets nowhere ends.
MAX_REQUEUES=${MAX_REQUEUES:-100}

cd "$CELLTRON"
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi
mkdir -p "$LOGS"
# The first node, and a port of this job's own.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))

# run_step OPTION... COMMAND...: srun with these options; its exit status, after the job is queued again if need be.
run_step() {
    local step status=0
    stop_seconds=
    trap 'stop_step USR1' USR1
    trap 'stop_step TERM' TERM
    srun --kill-on-bad-exit=1 --output="$LOGS/%j_%N.log" --open-mode=append "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [[ -n "$stop_seconds" ]] && ((SECONDS > stop_seconds + STOP_SECONDS)); then
            echo "the run did not stop within $STOP_SECONDS s" >&2
            requeue_job
            return 143
        fi
        sleep 1
    done
    wait "$step" || status=$?
    # celltron leaves with 143 after a SIGTERM, which SLURM may have sent to the tasks alone.
    if ((status == 143)) || { [[ -n "$stop_seconds" ]] && ((status != 0)); }; then
        requeue_job
    fi
    return "$status"
}

stop_step() {
    if [[ -n "$stop_seconds" ]] || { [[ "$1" == TERM ]] && job_is_ending; }; then
        return 0
    fi
    stop_seconds=$SECONDS
    echo "$1: the run is asked to save and stop" >&2
    scancel --signal=TERM "$SLURM_JOB_ID" || true
}

requeue_job() {
    if job_is_ending; then
        return 0
    elif ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
        echo "the job was queued again $MAX_REQUEUES times already and ends here; submit it once more to go on" >&2
    else
        echo "the job is queued again and goes on from its newest checkpoint" >&2
        scontrol requeue "$SLURM_JOB_ID" || true # ends all that is left of this job, and this script
    fi
}

# Whether SLURM ends the job by itself: it was cancelled, or is queued again already.
job_is_ending() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
    [[ -n "$state" && "$state" != RUNNING ]]
}
