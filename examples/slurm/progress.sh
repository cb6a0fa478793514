# shellcheck shell=bash
# Stops a job that is started again and again without getting anywhere. Sourced by train.sbatch.
# SAVE/.slurm-progress holds: the job, the iteration at which its last run began, runs in a row without progress.

latest_iteration() {
    cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null || echo none
}

# count_stalled_runs SAVE RESTART: note where this run begins; stop when the last two made no progress.
count_stalled_runs() {
    local job before stalled now
    now=$(latest_iteration "$1")
    read -r job before stalled 2>/dev/null <"$1/.slurm-progress" || true
    if [[ "$2" != 0 && "${job:-}" == "$SLURM_JOB_ID" && "${before:-}" == "$now" ]]; then
        stalled=$((stalled + 1))
    else
        stalled=0
    fi
    mkdir -p "$1"
    # A run that is stopped before it has left anything knows by this, when requeued, that SAVE is the same directory.
    [[ "$2" != 0 ]] || touch "$1/.started"
    echo "$SLURM_JOB_ID $now $stalled" >"$1/.slurm-progress"
    ((stalled < 2)) || give_up "$now"
}

# stop_if_stalled SAVE: after a run that did not finish, stop if it and the one before made no progress.
stop_if_stalled() {
    local before stalled now
    now=$(latest_iteration "$1")
    read -r _ before stalled <"$1/.slurm-progress"
    [[ "$before" != "$now" || "$stalled" == 0 ]] || give_up "$now"
}

give_up() {
    echo "error: two runs in a row made no progress beyond iteration $1; not requeued" >&2
    exit 1
}
