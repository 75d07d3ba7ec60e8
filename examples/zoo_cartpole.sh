#!/usr/bin/env bash
# Train, enjoy, record and plot CartPole-v1 with the programs of the RL Zoo; needs pip install -e '.[zoo]'.
#
#     bash examples/zoo_cartpole.sh                 # into runs/zoo
#     bash examples/zoo_cartpole.sh FOLDER STEPS
set -euo pipefail
folder=${1:-runs/zoo}
steps=${2:-50000}
agent=(--algo trpo --env CartPole-v1 -f "$folder")

# Hyperparameters come with sb3-trpo-ext; -params n_envs:4 would change one, --conf-file FILE.yml all of them.
trpo-zoo train "${agent[@]}" -n "$steps" --eval-freq "$((steps / 5))" --seed 0 --verbose 0

# Let it play, without a window; leave out --no-render to watch.
trpo-zoo enjoy "${agent[@]}" --no-render -n 2000

# A video, in the folder of the run.
trpo-zoo record_video "${agent[@]}" -n 500

# The training returns, in a window where there is a display.
trpo-zoo plot_train -a trpo -e CartPole-v1 -f "$folder" -w 20

# The evaluations, as a table.
trpo-zoo all_plots -a trpo -e CartPole-v1 -f "$folder" --no-display -o "$folder/evaluations"
