"""What a chaos run found, made small."""

import pytest

from tests.support import bot, eventually, message, setting, site
from tests.test_queue_command import queue, shown

ONCE = [setting("channelAutoRetryMaxAttempts", 1), setting("channelAutoRetryBaseDelayMs", 20)]


def test_retry_of_a_refused_message_says_nothing_to_a_device_that_was_answered(tmp_path):
    """Original mode: the device heard AE; a second, unasked answer is taken for that of its next message."""
    with site(tmp_path, {"ADT": ""}) as here:
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device("ADT") as device:
            assert device.ask(message("M1", patient="A")) == ("AE", "M1")
            eventually(lambda: shown(here, "list", "dead"))
            here.sandbox.bot = bot("AA")
            here.sandbox.faults.delay = lambda: 1.5 if here.sandbox.ids()[-1] == "M2" else 0.0
            device.send(message("M2", patient="B"))
            here.sandbox.wait_ids("M2")
            assert queue(here, "retry")[0] == 0
            assert device.heard(1) == [("AA", "M2")]


@pytest.mark.parametrize("mode", ["", "?enhanced=true"])
def test_retry_does_not_take_the_answer_that_a_half_closed_device_waits_for(tmp_path, mode):
    with site(tmp_path, {"ADT": mode}, ONCE) as here:
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device("ADT") as device:
            device.send(message("M1", patient="A"))
            eventually(lambda: shown(here, "list", "dead"))
            device.drain()
            here.sandbox.bot = bot("AA")
            here.sandbox.faults.delay = lambda: 2.0 if here.sandbox.ids()[-1] == "M2" else 0.0
            device.send(message("M2", patient="B"))
            here.sandbox.wait_ids("M2")
            device.half_close()
            assert queue(here, "retry")[0] == 0
            here.sandbox.wait_for(lambda: len(here.sandbox.of("M1")) == 2)
            heard = []
            while ("AA", "M2") not in heard:
                heard.append(device.ack())


def test_a_refused_message_that_comes_again_on_its_connection_is_answered_after_a_half_close(tmp_path):
    with site(tmp_path, {"ADT": ""}) as here:
        here.sandbox.bot = lambda transmit: (400, "no")
        with here.device("ADT") as device:
            assert device.ask(message("M1")) == ("AE", "M1")
            here.sandbox.bot = bot("AA")
            here.sandbox.faults.delay = lambda: 1.0
            device.send(message("M1"))
            device.half_close()
            assert device.ack() == ("AA", "M1")


def test_a_late_answer_for_a_message_that_was_given_up_says_nothing_more_to_its_device(tmp_path):
    """Original mode: the device heard AE when the time was up."""
    with site(tmp_path, {"ADT": "?responseTimeoutSecs=1"}, ONCE) as here:
        here.sandbox.faults.delay = lambda: 2.0
        with here.device("ADT") as device:
            assert device.ask(message("M1", patient="A")) == ("AE", "M1")
            device.send(message("M2", patient="B"))
            device.half_close()
            assert device.ack()[1] == "M2"


def test_the_answer_of_a_connection_that_is_gone_does_not_count_as_one_of_the_next(tmp_path):
    """Enhanced mode: the new connection gets both answers, also when it has ended its side."""
    with site(tmp_path, {"ADT": "?enhanced=true"}) as here:
        delays = {"M1": 1.0, "M2": 2.0}
        here.sandbox.faults.delay = lambda: delays[here.sandbox.ids()[-1]]
        with here.device("ADT") as gone:
            assert gone.ask(message("M1", patient="A")) == ("CA", "M1")
            here.sandbox.wait_ids("M1")
            gone.reset()
        with here.device("ADT") as device:
            assert device.ask(message("M2", patient="B")) == ("CA", "M2")
            here.sandbox.wait_ids("M2")
            assert device.ack() == ("AA", "M1")
            device.half_close()
            assert device.ack() == ("AA", "M2")


def test_a_late_success_of_an_earlier_attempt_counts_although_a_later_one_was_refused(tmp_path):
    """Else a person who sends the dead letter again has the Bot do twice what it has done."""
    with site(tmp_path, {"ADT": "?responseTimeoutSecs=1&autoRetryBaseDelayMs=50"}) as here:
        here.sandbox.faults.delay = lambda: 2.0 if len(here.sandbox.seen) == 1 else 0.0
        here.sandbox.bot = lambda transmit: bot("AA")(transmit) if transmit.callback.endswith("#1") else (400, "no")
        with here.device("ADT") as device:
            assert device.ask(message("M1")) == ("AE", "M1")
            here.agent.wait_state("M1", "processed")
            assert device.drain() == []
