#!/usr/bin/env bash
# One run on SLURM, on several nodes if --nodes says so, a process a GPU. In an environment in which
# `python -m ur4rec_jax.main` works, and with data and workdir on a file system that all nodes see:
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 --time=8:00:00 launch/slurm.sh \
#     --config=configs/movielens_1m.py --workdir=/shared/runs/movielens_1m
# Preempted or out of time, the run saves and is queued again. Exit codes:
#   1, 2, 3, 4, 126, 127   an error of the program, wrong input, divergence, storage, no Python: the
#                          job fails, as a person must look
#   others                 told to stop (143), killed, for example for want of memory (137), a device,
#                          process or node died: queued again, MAX_REQUEUES (20) times in all
#SBATCH --job-name=ur4rec
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# SLURM's own requeue after preemption needs no more than the line above; a time limit does not
# requeue, so the script does, when the TERM that comes 120 seconds before it has ended the run.
set -uo pipefail

export JAX_COORDINATOR_ADDRESS=auto # jax finds the rest in what srun sets.
# srun ends with the largest code, which may be that of a process that only lost the others. So the
# first process that ends leaves its code in a file, in the folder that all nodes see.
export UR4REC_EXIT_CODE_FILE=$PWD/.ur4rec-exit-code-$SLURM_JOB_ID
rm -f "$UR4REC_EXIT_CODE_FILE"
srun --kill-on-bad-exit=1 --label "${PYTHON:-python}" -u -m ur4rec_jax.main "$@"
code=$?
if ((code)) && [[ -s $UR4REC_EXIT_CODE_FILE ]]; then
  code=$(<"$UR4REC_EXIT_CODE_FILE")
fi
rm -f "$UR4REC_EXIT_CODE_FILE"

case $code in
  0 | 1 | 2 | 3 | 4 | 126 | 127) exit "$code" ;;
esac
((${SLURM_RESTART_COUNT:-0} < ${MAX_REQUEUES:-20})) || exit "$code"
echo "exit code $code: queueing job $SLURM_JOB_ID again" >&2
scontrol requeue "$SLURM_JOB_ID"
