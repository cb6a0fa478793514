"""The mixture of experts with Language Priors Routing: layer, router, losses, experts, statistics.

Names of tensors inside the functions end in their shape, a letter for each dimension:

    S sequence (under sequence parallelism this rank's part)    B batch    T = S x B tokens
    D hidden size    F FFN size    I, O input and output size of a linear layer
    E experts, the original one first    N new experts    K choices of a token
    R rows that experts compute: a token once for each new expert that it chose
    C tokens that chose the original expert
    G language groups    L layers    M sums that the statistics hold (`routing_statistics.py`)

`choices_TE` is true where a token chose an expert; a digit is a size of that number, as in `tags_T4`.
"""
