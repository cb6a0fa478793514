"""What a run will need before it is started: parameters, memory, communication, layouts. Nothing is built or loaded.

Symbols in formulas: B sequences of a micro-batch, S tokens of a sequence, D hidden size, F FFN size, H attention heads,
G query groups, d dimension of a head, V vocabulary, E experts of a layer (the original one included), K experts of a
token; TP, PP, EP, DP ranks along each parallel dimension, ETP ranks that share each matrix of a new expert.
"""
