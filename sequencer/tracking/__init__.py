"""The log of a run and the services that its metrics are sent to."""
