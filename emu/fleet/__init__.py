"""Many guests under one budget: each its own process with its own RAM and real RSS, one host over all.

scenario   what is to run, from TOML
wire       messages between host and guests
guest      a guest's process: machine, workload, and the host's hand in it
host       the host's process: budget, requests, what it does about guests that hang, flood, lie, or die
"""

from emu.fleet.host import run_fleet
from emu.fleet.scenario import Fleet, read_fleet
from emu.observe.fleet import FleetResult, GuestResult

__all__ = ["Fleet", "FleetResult", "GuestResult", "read_fleet", "run_fleet"]
