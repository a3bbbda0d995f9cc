
# What a launch around `sbatch` may have left here.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT
unset RESTART_COUNT TORCHELASTIC_RESTART_COUNT OMPI_COMM_WORLD_RANK PMI_RANK JOB_COMPLETION_INDEX

# Every start goes on with this run.
export {{run_dir_variable}}={{run_dir}}
# The ranks let each other in by it: new in every start, and in no file.
{{secret}}=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') && export {{secret}}

# USR1 comes before the time limit, TERM when the job is cancelled: both ask the program to end.
# srun runs in the background because bash hears no signal while it waits for what is in front.
ended=
trap '[[ -z ${srun-} ]] || kill -TERM "$srun"' USR1
trap 'ended=1; [[ -z ${srun-} ]] || kill -TERM "$srun"' TERM INT
{{command}} &
srun=$!
wait "$srun"
code=$?
# A signal ends `wait`, not srun.
while kill -0 "$srun" 2>/dev/null; do
    wait "$srun"
    code=$?
done

# A node that fails is Slurm's own reason to start the job again; a program that fails, or that the
# time limit ends, is ours. A job that somebody has cancelled no longer runs, and is left alone.
restarts=${SLURM_RESTART_COUNT:-0}
if ((code != 0 && restarts < {{max_restarts}})) && [[ -z $ended ]] &&
    [[ -n $(squeue --noheader --jobs="$SLURM_JOB_ID" --states=RUNNING --format=%i) ]]; then
    echo "mobula: exit code $code; restart $((restarts + 1)) of {{max_restarts}}"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
