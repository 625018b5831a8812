#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU VM, started from your own machine:
#   bash launch/tpu_vm.sh TPU_NAME ZONE --config=configs/movielens_1m.py --workdir=/mnt/shared/runs/1m
# The hosts need this folder as ~/ur4rec_jax with an environment in .venv (`pip install -e
# '.[tpu]'`), and a file system that all of them see at /mnt/shared, such as Filestore, for data
# and workdir. The loop starts the run again as long as that helps:
#   1, 2, 3, 4, 126, 127   an error of the program, wrong input, divergence, storage, no Python:
#                          stops, as a person must look
#   others                 told to stop (143), killed, for example for want of memory (137), a device
#                          failed, a host died or went into maintenance: starts again, up to 20 times
# gcloud itself ends with 1 when it cannot reach a host. So that the two can be told apart, an error of
# the program (1) is passed on as 2.
# A preempted spot TPU is gone: create it again, then start this same command.
set -uo pipefail

if (($# < 3)); then
  echo 'usage: bash launch/tpu_vm.sh TPU_NAME ZONE --config=FILE --workdir=DIR ...' >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v flags ' %q' "$@"
command="cd ~/ur4rec_jax || exit 2"
command+="; JAX_COORDINATOR_ADDRESS=auto .venv/bin/python -u -m ur4rec_jax.main$flags"
command+="; code=\$?; [ \$code != 1 ] || exit 2; exit \$code"

for attempt in {1..20}; do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
  code=$?
  case $code in
    0 | 2 | 3 | 4 | 126 | 127) exit "$code" ;;
  esac
  ((attempt < 20)) || break
  echo "attempt $attempt ended with exit code $code; starting again in a minute" >&2
  sleep "${PAUSE:-60}"
done
exit "$code"
