"""Devices and processes: mesh, hosts, signals, per-backend choices, compiled programs."""
