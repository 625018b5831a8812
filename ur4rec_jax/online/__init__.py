"""What happens around a model that serves: events, what was shown, experiments."""
