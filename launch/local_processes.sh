#!/usr/bin/env bash
# One run in N processes on this machine:
#   bash launch/local_processes.sh 2 --config=configs/synthetic.py --workdir=runs/synthetic
# A process that ends early ends the others, and so does a signal to this script; then start the same
# command again. It exits with the code of the process that ended first. Exit codes:
#   1, 2, 3, 4, 126, 127   an error of the program, wrong input, divergence, storage, no Python: a
#                          person must look
#   others                 told to stop, killed, a device failed: the same command goes on
# PYTHON=/path/to/python chooses the interpreter; on GPUs process n gets GPU n.
set -uo pipefail

number=${1:-}
if ! [[ $number =~ ^[1-9][0-9]*$ && $# -gt 1 ]]; then
  echo 'usage: bash launch/local_processes.sh N --config=FILE --workdir=DIR ...' >&2
  exit 2
fi
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])') ||
  exit 2

pids=()
stop_all() { # They save; 30 seconds later they are killed.
  # From bash's own list, which has a process that a signal comes too early to add to pids.
  mapfile -t running < <(jobs -pr)
  ((${#running[@]})) || return 0
  kill -s TERM "${running[@]}" 2>/dev/null
  (sleep 30 && kill -s KILL "${running[@]}") >/dev/null 2>&1 &
  killer=$!
  wait "${running[@]}" 2>/dev/null
  kill "$killer" 2>/dev/null
}
trap 'stop_all; exit 143' TERM
trap 'stop_all; exit 129' HUP
trap 'stop_all; exit 130' INT

for ((i = 0; i < number; i++)); do
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$number JAX_PROCESS_ID=$i \
    JAX_CUDA_VISIBLE_DEVICES=$i "$python" -m ur4rec_jax.main "$@" &
  pids+=($!)
done

code=0
for ((left = number; left; left--)); do
  wait -n -p ended "${pids[@]}" 2>/dev/null
  code=$?
  for i in "${!pids[@]}"; do
    if [[ ${pids[i]} == "$ended" ]]; then
      unset "pids[i]"
      break
    fi
  done
  if ((code)); then
    how="exit code $code"
    ((code > 128)) && how+=" (SIG$(kill -l "$code"))"
    echo "process $i of $number ended with $how; ending the others" >&2
    stop_all
    case $code in
      1 | 2 | 3 | 4 | 126 | 127) ;;
      *) echo 'start the same command again to go on from the last checkpoint' >&2 ;;
    esac
    break
  fi
done
exit "$code"
