"""The embedded cluster: controllers, scheduler, pods, probes, supervisor."""
