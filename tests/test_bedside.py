"""Devices on the hospital's side that no other test has: analyzers, interface engines and modalities with habits."""

import pytest

from medplum_agent import astm_frame
from tests.dicom_peers import FAST, IMPLICIT, MPPS, QUIET, Scu, new_uid
from tests.instruments import ACK, ENQ, EOT, ETB, ETX, NAK, Instrument, bad, body_of, frames_of, of
from tests.support import Site, accepts, eventually, site
from tests.test_laboratory import ASTM, came, dead, partials, silent_bot

FIRST = ("H|\\^&|||COBAS", "P|1", "O|1|S1", "R|1|^^^GLU|5.4|mmol/L", "L|1|N")
SECOND = ("H|\\^&|||COBAS", "P|1", "O|1|S2", "R|1|^^^GLU|6.1|mmol/L", "L|1|N")


def at(here: Site, channel: str) -> Instrument:
    """Connected, once the agent listens."""
    eventually(lambda: accepts(("127.0.0.1", here.ports[channel])), 20)
    return Instrument.at(here.ports[channel])


# --- analyzers ---


def begins_second(device: Instrument) -> None:
    """A session of two messages, up to the middle of a record of the second."""
    frames = frames_of(*FIRST, *SECOND)
    assert [device.ask(raw) for raw in (ENQ, *frames[:8])] == [ACK] * 9
    assert device.ask(astm_frame(9, b"R|1|^^^GL", ETB[0])) == ACK


@pytest.mark.parametrize("how", ["EOT", "closed", "killed"])
def test_what_an_l_record_ended_is_delivered_though_the_session_breaks_off_behind_it(tmp_path, how):
    """An analyzer that sends several results in a session forgets each with the ACK of its L record (LIS02-A2 14), and
    sends only the interrupted one again: the others were dead letters with it."""
    with site(tmp_path, {"LAB": ASTM}) as here:
        here.sandbox.bot = silent_bot
        with at(here, "LAB") as device:
            begins_second(device)
            if how == "killed":
                here.agent.kill()
                here.agent.start()
            elif how == "EOT":
                device.write(EOT)
        came(here, "LAB", body_of(*FIRST))
        dead(here, "LAB", body_of(*SECOND[:3], "R|1|^^^GL"))
        eventually(lambda: partials(here) == 0)
        assert len(of(here, "LAB")) == 1


def test_a_message_is_whole_though_the_first_frame_of_the_next_one_was_refused_six_times(tmp_path):
    """NAK x 6 behind an L record, and EOT (E1381 6.5.1.2): the message that was acknowledged was a dead letter."""
    with site(tmp_path, {"LAB": ASTM}) as here:
        here.sandbox.bot = silent_bot
        with at(here, "LAB") as device:
            device.session(*FIRST, eot=False)
            assert [device.ask(bad(astm_frame(6, b"H|\\^&\r", ETX[0]))) for _ in range(6)] == [NAK] * 6
            device.write(EOT)
            came(here, "LAB", body_of(*FIRST))


# --- modalities ---


@QUIET
@pytest.mark.parametrize("rest", [b"CT_1", b""])
def test_a_procedure_step_whose_data_set_breaks_off_is_not_answered_with_success(tmp_path, rest):
    """Like an object: the modality heard 0x0000, and the Bot got the half of the value that was there, and no more."""
    whole = b"\x40\0\x52\2\x0a\0\0\0COMPLETED "
    with site(tmp_path, {"CT": f"dicom://127.0.0.1:{{port}}?{FAST}"}) as here:
        here.sandbox.bot = silent_bot
        eventually(lambda: accepts(("127.0.0.1", here.ports["CT"])), 20)
        with Scu(here.ports["CT"], [(MPPS, (IMPLICIT,))]) as scu:
            for content in (whole + b"\x40\0\x53\2\x10\0\0\0" + rest, whole):
                scu.request(1, {3: MPPS, 0x1001: new_uid(), 0x0100: 0x0120}, content)
            assert [scu.status(), scu.status()] == [0x0110, 0]
        here.sandbox.wait_for(lambda: of(here, "CT"))
        assert len(of(here, "CT")) == 1
