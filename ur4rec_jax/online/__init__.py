"""Learning from a live service: experiments, interleaving and estimates from its logs."""
