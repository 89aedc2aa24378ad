"""stepwire for asyncio: the client whose calls are awaited.

    async with stepwire.aio.connect("localhost:50051") as client:
        async with await client.create_session({"w": w}, optimizer=stepwire.Adam(lr=1e-3)) as session:
            params = await session.step({"w": gradient})

The methods are those of `stepwire.Client` and `stepwire.Session`, made from them by `make aio`. docs/numpy.md
tells about cancelled steps, and about the threads behind the calls.
"""

from __future__ import annotations

from stepwire.aio.surface import AsyncClient, AsyncSession, connect

__all__ = ["AsyncClient", "AsyncSession", "connect"]
