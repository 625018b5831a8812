"""Events and exposures of a served model, experiments on it, and its updates."""
