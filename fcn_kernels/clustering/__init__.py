"""Cluster and aggregate: rows shared out among learned centers, and summed there."""
