"""The two stages of MoE-LPR, and the loop that runs them."""
