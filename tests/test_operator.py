"""The people: who installs it, sets it up with mistakes, is woken up at night, and tries things."""

import asyncio
import unittest.mock

from demo import Demo


def test_a_ctrl_c_that_comes_with_an_analyzers_bytes_is_not_lost():
    """The demo's analyzer went on, heard the agent close its line, and said that the demo broke off."""

    async def cancelled_after(turns: int) -> bool:
        reader = asyncio.StreamReader()
        analyzer = asyncio.create_task(Demo.__new__(Demo)._sessions(reader, unittest.mock.Mock()))
        for _ in range(5):
            await asyncio.sleep(0)
        reader.feed_data(b"\x06")
        for _ in range(turns):
            await asyncio.sleep(0)
        analyzer.cancel()
        reader.feed_eof()
        await asyncio.wait({analyzer})
        return analyzer.cancelled()

    assert [asyncio.run(cancelled_after(turns)) for turns in range(5)] == [True] * 5
