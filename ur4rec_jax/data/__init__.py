"""A prepared folder -> histories, features and packed batches."""
