"""`adafv bench speed`: what a call costs, stage by stage, unpruned, pruned, and beside two other ways.

shapes.py      the models: a checkpoint, or a named shape with random weights
stages.py      time per stage, on the device's own clock
counting.py    operations, arithmetic, bytes, waits and memory per stage
ways.py        the ways to a first token: unpruned, pruned, the ideal, the published one
run.py         measures a model: interleaved rounds, medians, ratios within a round
choosing.py    measures what every method costs, apart from a model
report.py      the results as JSON and as tables
command.py     all of it as one function
"""
