"""What pruning costs, saves and loses, measured: `adafv bench`.

speed/    seconds, operations, bytes and memory of a call, stage by stage
"""
