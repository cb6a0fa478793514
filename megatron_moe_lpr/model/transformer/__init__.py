"""Parts of the dense transformer: attention and norm of the local layers, rotary embedding of all."""
