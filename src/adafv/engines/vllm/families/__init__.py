"""One file per family of vLLM's model classes; a class called AdaFV + the stock architecture serves it pruned.

A file holds the class, which is `PrunedModel` in front of vLLM's, and the processor that vLLM is to use with it, which is
`PrunedProcessor` in front of vLLM's. vLLM must have the class's tower end in the layer that the projector reads.
"""
