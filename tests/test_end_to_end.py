"""Device -> agent -> server -> Bot -> agent -> device, over real sockets (channel contract 4 and 5)."""

import json
import re
import stat
import threading
import time

import pytest

import medplum_agent
from tests.support import CORPUS, Device, bot, control_id, eventually, log_lines, message, site

QUICK = "autoRetryBaseDelayMs=20&autoRetryMaxDelayMs=40"
CHANNELS = {
    "ORIGINAL": "",
    "ENHANCED": "?enhanced=true",
    "AA": "?enhanced=aa",
    "AL": "?enhanced=true&appLevelAck=AL",
    "ER": "?enhanced=true&appLevelAck=er",
    "NE": "?enhanced=TRUE&appLevelAck=NE",
    "SU": "?enhanced=true&appLevelAck=SU",
    "LATIN": "?encoding=latin1",
    "WINDOWS": "?encoding=windows-1252",
    "RATE": "?messagesPerMin=600",
    "REJECT": "?enhanced=true&duplicateBehavior=reject",
    "REJECT-AA": "?enhanced=aa&duplicateBehavior=reject",
    "ACCEPT": "?enhanced=true&duplicateBehavior=accept",
    "BOT-NONE": "?botErrorAck=none",
    "BOT-AR": "?botErrorAck=AR",
    "EMPTY-AE": "?botEmptyAck=AE",
    "EMPTY-NONE": "?botEmptyAck=none",
    "GUARANTEED": f"?retryMode=guaranteed&{QUICK}",
    "NORMAL": f"?retryMode=normal&responseTimeoutSecs=0.5&{QUICK}",
    "NO-RETRY": f"?retryMode=none&responseTimeoutSecs=0.5&{QUICK}",
    "SMALL": "?maxMessageBytes=2048",
    "SMALL-ENHANCED": "?maxMessageBytes=2048&enhanced=true",
    "TWO": "?maxConnections=2",
    "IDLE": "?idleTimeoutSecs=1",
    "FRAME": "?frameTimeoutSecs=1",
    "LOOPBACK-2": "mllp://127.0.0.2:{port}",
    "ANY": "mllp://0.0.0.0:{port}",
    "MANY": "?maxWorkers=64",
}


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    with site(tmp_path_factory.mktemp("end-to-end"), CHANNELS, start=False) as running:
        running.agent.start(ready=False)
        running.agent.logged("Medplum service started")
        running.agent.wait_connected()
        yield running


@pytest.fixture
def here(shared_site):
    """The running site, with a well-behaved server again after each test."""
    yield shared_site
    faults, fresh = shared_site.sandbox.faults, type(shared_site.sandbox.faults)()
    for name in vars(fresh):
        setattr(faults, name, getattr(fresh, name))
    shared_site.sandbox.bot = bot("AA")


# --- modes ---


def test_original_mode_answers_once_with_the_bots_ack(here):
    with here.device("ORIGINAL") as device:
        device.send(message("ORIG-1"))
        answer = device.receive()
        assert "MSA|AA|ORIG-1" in answer
        assert device.drain() == []
    (transmit,) = here.sandbox.of("ORIG-1")
    assert transmit.body == message("ORIG-1")
    assert transmit.content_type == "x-application/hl7-v2+er7"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", transmit.remote)


def test_the_bots_answer_arrives_unchanged(here):
    answer = "MSH|^~\\&|BOT|S|||20260101||ACK^A01^ACK|B1|P|2.5.1\rMSA|AA|SAME-1|Grüße\rERR|||0|I\r"
    here.sandbox.bot = lambda transmit: (200, answer)
    with here.device("ORIGINAL") as device:
        device.send(message("SAME-1"))
        assert device.receive() == answer


def test_enhanced_mode_answers_ca_then_the_bots_ack(here):
    with here.device("ENHANCED") as device:
        device.send(message("ENH-1", kind="ADT^A08^ADT_A01"))
        accept = device.receive()
        msh, msa = (segment.split("|") for segment in accept.rstrip("\r").split("\r"))
        assert msa == ["MSA", "CA", "ENH-1", "Commit Accept"]
        assert msh[2:6] == ["AGENT", "SITE", "ADT1", "WARD"]
        assert msh[8] == "ACK^A08^ACK" and msh[10:12] == ["P", "2.5.1"]
        assert re.fullmatch(r"\d{14}\.\d{3}", msh[6])
        assert device.ack() == ("AA", "ENH-1")


def test_aa_mode_answers_aa_itself_and_drops_the_bots(here):
    here.sandbox.bot = bot("AE")
    with here.device("AA") as device:
        assert device.ask(message("AAM-1")) == ("AA", "AAM-1")
        here.sandbox.wait_ids("AAM-1")
        assert device.drain() == []


@pytest.mark.parametrize(
    ("channel", "passed"), [("AL", "AA AE AR XX"), ("ER", "AE AR XX"), ("NE", "XX"), ("SU", "AA XX")]
)
@pytest.mark.parametrize("code", ["AA", "AE", "AR", "XX"])
def test_application_level_ack_table(here, channel, passed, code):
    here.sandbox.bot = bot(code)
    control = f"{channel}-{code}"
    with here.device(channel) as device:
        assert device.ask(message(control)) == ("CA", control)
        here.agent.wait_state(control, "processed")
        expected = [(code, control)] if code in passed else []
        assert device.heard(len(expected)) == expected


def test_each_ack_has_its_own_control_id(here):
    with here.device("AA") as device:
        device.send(*(message(f"OWN-{n}", patient=f"OWN-{n}") for n in range(200)))
        ids = {control_id(device.receive()) for _ in range(200)}
    assert len(ids) == 200


def test_an_acknowledgment_is_not_acknowledged(here):
    with here.device("ENHANCED") as device:
        device.send("MSH|^~\\&|A|B|C|D|20260101||ACK^A01|ACK-1|P|2.5.1\rMSA|AA|X1\r")
        here.sandbox.wait_ids("ACK-1")
        assert ("CA", "ACK-1") not in device.drain()


# --- sequence numbers, encodings, rate ---


def test_sequence_numbers_start_at_zero_and_go_on_after_restarts(tmp_path):
    with site(tmp_path, {"SEQ": "?enhanced=true&assignSeqNo=true"}) as here:
        for start in (0, 3):
            with here.device("SEQ") as device:
                device.send(*(message(f"SEQ-{start + n}") for n in range(3)))
                here.sandbox.wait_ids(*(f"SEQ-{start + n}" for n in range(3)))
            here.agent.terminate() if start else here.agent.kill()
            here.agent.start()
        with here.device("SEQ") as device:
            device.ask(message("SEQ-0"))  # a repetition burns no number
            device.ask(message("SEQ-6"))
        here.sandbox.wait_ids("SEQ-6")
        found = {control_id(t.body): t.body.split("\r")[0].split("|")[12] for _, t in here.sandbox.seen}
    assert found == {f"SEQ-{n}": str(n) for n in range(7)}
    assert here.sandbox.of("SEQ-6")[0].body == message("SEQ-6").replace("|2.5.1\r", "|2.5.1|6\r", 1)


@pytest.mark.parametrize(
    ("channel", "encoding", "text"), [("LATIN", "latin-1", "Müßig ¥"), ("WINDOWS", "windows-1252", "Größe 5 € – „x“")]
)
def test_encodings_both_ways(here, channel, encoding, text):
    here.sandbox.bot = bot("AA", text)
    with here.device(channel) as device:
        device.send(message(f"ENC-{channel}", text=text).encode(encoding))
        answer = device.receive_bytes()
    assert here.sandbox.of(f"ENC-{channel}")[0].body == message(f"ENC-{channel}", text=text)
    assert text in answer.decode(encoding)


def test_messages_per_minute_spaces_one_connection(here):
    with here.device("RATE") as first, here.device("RATE") as second:
        second.ask(message("RATE-0", patient="R0"))
        first.send(*(message(f"RATE-{n}", patient=f"R{n}") for n in range(1, 8)))
        time.sleep(0.1)  # the second connection's own spacing is over
        assert second.ask(message("RATE-8", patient="R8")) == ("AA", "RATE-8")
        assert [first.ack() for _ in range(7)] == [("AA", f"RATE-{n}") for n in range(1, 8)]
    times = {control_id(t.body): at for at, t in here.sandbox.seen if "|RATE-" in t.body}
    gaps = [times[f"RATE-{n + 1}"] - times[f"RATE-{n}"] for n in range(1, 7)]
    assert sum(gaps) >= 0.55, gaps
    assert times["RATE-8"] < times["RATE-7"]


# --- duplicates ---


@pytest.mark.parametrize(("channel", "codes"), [("ORIGINAL", ["AA"]), ("AA", ["AA"]), ("ENHANCED", ["CA", "AA"])])
def test_a_repetition_gets_the_earlier_answer_and_is_not_sent_again(here, channel, codes):
    control = f"DUP-{channel}"
    here.sandbox.bot = bot("AA", "the first answer")
    with here.device(channel) as device:
        device.send(message(control))
        first = [device.receive() for _ in codes]
        here.agent.wait_state(control, "processed")
        here.sandbox.bot = bot("AE", "another answer")
        device.send(message(control))
        replayed = device.receive()
        assert device.drain() in ([], [("AA", control)])
    assert replayed == first[-1] if channel != "AA" else f"MSA|AA|{control}" in replayed
    assert len(here.sandbox.of(control)) == 1


def test_a_repetition_of_a_message_in_work_is_absorbed(here):
    here.sandbox.faults.delay = lambda: 0.6
    with here.device("ORIGINAL") as first, here.device("ORIGINAL") as second:
        first.send(message("WORK-1"))
        here.sandbox.wait_ids("WORK-1")
        second.send(message("WORK-1"))
        assert second.ack() == ("AA", "WORK-1")
        assert first.drain() == [] == second.drain()
    assert len(here.sandbox.of("WORK-1")) == 1


@pytest.mark.parametrize("channel", ["ORIGINAL", "ENHANCED", "AA"])
def test_a_control_id_with_other_content_is_a_new_message(here, channel):
    """Analyzers count from 1 again, and two may share a port."""
    control, count = f"OTHER-{channel}", 2 if channel == "ENHANCED" else 1
    with here.device(channel) as device:
        for text in (message(control), message(control, text="changed"), message(control).replace("|ADT1|", "|ADT2|")):
            device.send(text)
            assert device.heard(count)[0][0] in ("AA", "CA")
    here.sandbox.wait_for(lambda: len(here.sandbox.of(control)) == 3)
    assert here.agent.main_log().count(b"came again with other content") >= 1


def test_a_repetition_with_another_time_is_answered_from_the_queue(here):
    with here.device("ORIGINAL") as device:
        assert device.ask(message("TIME-1")) == ("AA", "TIME-1")
        assert device.ask(message("TIME-1").replace("|20260101120000|", "|20260101120500|")) == ("AA", "TIME-1")
    assert len(here.sandbox.of("TIME-1")) == 1
    here.agent.logged("came again from")


@pytest.mark.parametrize(("channel", "code"), [("REJECT", "CR"), ("REJECT-AA", "AR")])
def test_reject_mode_rejects_equal_bytes_too(here, channel, code):
    control = f"REJ-{channel}"
    with here.device(channel) as device:
        device.send(message(control))
        device.heard(2 if code == "CR" else 1)
        assert device.ask(message(control)) == (code, control)
    assert len(here.sandbox.of(control)) == 1


def test_accept_mode_takes_every_message_as_new(here):
    with here.device("ACCEPT") as device:
        device.send(message("ACC-1"), message("ACC-1"), message("ACC-1", text="other"))
        assert sorted(device.heard(6)) == [("AA", "ACC-1")] * 3 + [("CA", "ACC-1")] * 3
    assert len(here.sandbox.of("ACC-1")) == 3


def test_messages_without_control_id_are_never_duplicates(here):
    with here.device("ENHANCED") as device:
        device.send(message("", patient="NOID"), message("", patient="NOID"))
        assert sorted(device.heard(4)) == [("AA", ""), ("AA", ""), ("CA", ""), ("CA", "")]


# --- Bots that fail or say nothing ---


@pytest.mark.parametrize(
    ("channel", "status", "body", "expected"),
    [
        ("ORIGINAL", 400, "{}", ["AE"]),
        ("BOT-AR", 400, "{}", ["AR"]),
        ("BOT-NONE", 400, "{}", []),
        ("ORIGINAL", 200, "", ["AA"]),
        ("EMPTY-AE", 200, "", ["AE"]),
        ("EMPTY-NONE", 200, "", []),
        ("ORIGINAL", 200, {"resourceType": "Patient"}, ["AA"]),
    ],
)
def test_bot_failure_and_silence_in_original_mode(here, channel, status, body, expected):
    here.sandbox.bot = lambda transmit: (status, body)
    control = f"BOT-{channel}-{status}-{len(str(body))}"
    with here.device(channel) as device:
        device.send(message(control))
        here.agent.wait_state(control, "rejected" if status == 400 else "processed")
        assert device.heard(len(expected)) == [(code, control) for code in expected]


@pytest.mark.parametrize("code", ["AE", "AR"])
def test_the_bots_own_refusal_is_relayed(here, code):
    here.sandbox.bot = bot(code, "no such ward")
    with here.device("ORIGINAL") as device:
        device.send(message(f"RELAY-{code}"))
        answer = device.receive()
    assert f"MSA|{code}|RELAY-{code}|no such ward" in answer
    assert len(here.sandbox.of(f"RELAY-{code}")) == 1


# --- retry modes (channel contract 5.5) ---


def failing(times, result, then=("AA", "bot")):
    """A Bot that gives `result` so many times, and then an AA."""
    left = [times]

    def run(transmit):
        left[0] -= 1
        return result(transmit) if left[0] >= 0 else bot(*then)(transmit)

    return run


def test_guaranteed_retries_ae_without_relaying_it(here):
    here.sandbox.bot = failing(3, bot("AE"))
    with here.device("GUARANTEED") as device:
        assert device.ask(message("GUA-AE")) == ("AA", "GUA-AE")
        assert device.drain() == []
    assert [t.callback.split("#")[1] for t in here.sandbox.of("GUA-AE")] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("status", [400, 429, 500])
def test_guaranteed_retries_every_status(here, status):
    here.sandbox.bot = failing(2, lambda transmit: (status, "{}"))
    with here.device("GUARANTEED") as device:
        assert device.ask(message(f"GUA-{status}")) == ("AA", f"GUA-{status}")
    assert len(here.sandbox.of(f"GUA-{status}")) == 3


def test_guaranteed_relays_ar_and_keeps_a_dead_letter(here):
    here.sandbox.bot = bot("AR")
    with here.device("GUARANTEED") as device:
        assert device.ask(message("GUA-AR")) == ("AR", "GUA-AR")
    row = here.agent.wait_state("GUA-AR", "rejected")
    assert (
        row["error_code"] == "upstream-rejected"
        and row["attempts"] == 1
        and row["original"] == message("GUA-AR").encode()
    )


def test_guaranteed_lets_an_ack_in_the_body_overrule_the_status(here):
    here.sandbox.bot = lambda transmit: (400, bot("AA")(transmit)[1])
    with here.device("GUARANTEED") as device:
        assert device.ask(message("GUA-400-AA")) == ("AA", "GUA-400-AA")
    assert len(here.sandbox.of("GUA-400-AA")) == 1


def test_normal_retries_server_errors_up_to_ten_times(here):
    here.sandbox.bot = lambda transmit: (503, "{}")
    with here.device("NORMAL") as device:
        assert device.ask(message("NOR-503")) == ("AE", "NOR-503")
    assert here.agent.wait_state("NOR-503", "failed")["error_code"] == "server-error"
    assert len(here.sandbox.of("NOR-503")) == 10


@pytest.mark.parametrize(
    ("channel", "status", "state", "error"),
    [
        ("NORMAL", 400, "rejected", "server-rejected"),
        ("NO-RETRY", 400, "rejected", "server-rejected"),
        ("NO-RETRY", 500, "failed", "server-error"),
        ("NO-RETRY", 429, "failed", "server-rate-limited"),
    ],
)
def test_what_is_not_retried_becomes_a_dead_letter_at_once(here, channel, status, state, error):
    here.sandbox.bot = lambda transmit: (status, "{}")
    control = f"{channel}-{status}"
    with here.device(channel) as device:
        assert device.ask(message(control)) == ("AE", control)
    assert here.agent.wait_state(control, state)["error_code"] == error
    assert len(here.sandbox.of(control)) == 1


@pytest.mark.parametrize("channel", ["NORMAL", "NO-RETRY"])
def test_an_unanswered_message_is_not_repeated_in_normal_and_none(here, channel):
    here.sandbox.faults.silent = True
    control = f"{channel}-silent"
    with here.device(channel) as device:
        assert device.ask(message(control)) == ("AE", control)
    assert here.agent.wait_state(control, "failed")["error_code"] == "response-timeout"
    assert len(here.sandbox.of(control)) == 1


def test_normal_does_not_look_at_the_acks_code(here):
    here.sandbox.bot = bot("AE")
    with here.device("NORMAL") as device:
        assert device.ask(message("NOR-AE")) == ("AE", "NOR-AE")
    here.agent.wait_state("NOR-AE", "processed")


# --- connections that come and go ---


@pytest.mark.parametrize("leave", [Device.close, Device.reset])
@pytest.mark.parametrize(("channel", "before"), [("ORIGINAL", []), ("ENHANCED", ["CA"])])
def test_a_sender_that_reconnects_gets_its_answer(here, channel, before, leave):
    here.sandbox.faults.delay = lambda: 0.6
    control = f"AGAIN-{channel}-{leave.__name__}"
    device = here.device(channel)
    device.send(message(control))
    assert [device.ack()[0] for _ in before] == before
    here.sandbox.wait_ids(control)
    leave(device)
    with here.device(channel, timeout=3) as device:
        assert device.ack() == ("AA", control)


@pytest.mark.parametrize("channel", ["ORIGINAL", "ENHANCED"])
def test_a_half_closed_sender_still_gets_its_answers(here, channel):
    here.sandbox.faults.delay = lambda: 0.2
    with here.device(channel) as device:
        device.send(message(f"HALF-{channel}-1", patient="H1"), message(f"HALF-{channel}-2", patient="H2"))
        device.half_close()
        codes = ["AA", "AA"] if channel == "ORIGINAL" else ["CA", "CA", "AA", "AA"]
        assert [device.ack()[0] for _ in codes] == codes
        assert device.closed_by_peer()


def test_an_unanswered_sender_learns_it_at_reconnection_by_repeating(here):
    here.sandbox.faults.delay = lambda: 0.3
    device = here.device("ORIGINAL")
    device.send(message("GONE-1"))
    here.sandbox.wait_ids("GONE-1")
    device.reset()
    assert here.agent.wait_state("GONE-1", "processed")["ack_outcome"] == "undelivered"
    with here.device("ORIGINAL") as device:
        assert device.ask(message("GONE-1")) == ("AA", "GONE-1")
    eventually(lambda: here.agent.rows("GONE-1")[0]["ack_outcome"] == "delivered")
    assert len(here.sandbox.of("GONE-1")) == 1


@pytest.mark.parametrize(("channel", "code"), [("SMALL", "AR"), ("SMALL-ENHANCED", "CR")])
def test_a_too_large_frame_is_refused_and_the_next_one_is_fine(here, channel, code):
    with here.device(channel) as device:
        device.send(message("BIG-1", size=5000), message(f"AFTER-{channel}"))
        answer = device.receive()
        assert f"MSA|{code}|" in answer and "2048" in answer
        assert device.ack()[1] == f"AFTER-{channel}"


def test_one_bad_frame_never_costs_a_good_one(here):
    """And what is no message is answered at most once a second."""
    with here.device("ORIGINAL") as device:
        device.send(message("GOOD-1", patient="G1"), *["PID|not a message", b""] * 50, message("GOOD-2", patient="G2"))
        found = device.heard(3)
    assert sorted(found) == [("AA", "GOOD-1"), ("AA", "GOOD-2"), ("AR", "")]


def test_connection_limit(here):
    with here.device("TWO") as first, here.device("TWO") as second:
        assert first.ask(message("TWO-1"))[0] == second.ask(message("TWO-2"))[0] == "AA"
        with here.device("TWO") as third:
            assert third.closed_by_peer()
        assert first.ask(message("TWO-3"))[0] == "AA"

    def works():
        with here.device("TWO") as device:
            try:
                return device.ask(message("TWO-4")) == ("AA", "TWO-4")
            except (OSError, EOFError):
                return False

    eventually(works)


def test_a_silent_connection_is_closed_after_the_idle_time(here):
    with here.device("IDLE") as device, here.device("ORIGINAL") as other:
        assert device.ask(message("IDLE-1")) == ("AA", "IDLE-1")
        assert device.closed_by_peer(5)
        assert other.ask(message("IDLE-2")) == ("AA", "IDLE-2")


def test_a_sender_that_stops_inside_a_frame_is_closed(here):
    with here.device("FRAME") as stalled, here.device("FRAME") as idle:
        stalled.send_raw(b"\x0bMSH|^~\\&|")
        assert stalled.closed_by_peer(5)
        assert idle.ask(message("FRAME-1")) == ("AA", "FRAME-1")


def test_the_bind_address_is_honoured(here):
    with here.device("LOOPBACK-2", host="127.0.0.2") as device:
        assert device.ask(message("BIND-1")) == ("AA", "BIND-1")
    with pytest.raises(ConnectionRefusedError):
        here.device("LOOPBACK-2", host="127.0.0.1")
    with Device(here.ports["ANY"], host="127.0.0.3") as device:
        assert device.ask(message("BIND-2")) == ("AA", "BIND-2")


# --- none disturbs another ---


def test_bad_neighbours_disturb_nobody(here):
    big = "x" * 100_000
    here.sandbox.bot = lambda t: bot("AA", big if "SLOW" in t.body else "ok")(t)
    with (
        here.device("MANY") as garbage,
        here.device("MANY") as stalled,
        here.device("MANY", receive_buffer=4096) as slow,
        here.device("MANY") as good,
    ):
        garbage.send_raw(bytes(range(256)) * 400)
        stalled.send_raw(b"\x0b" + message("STALLED").encode()[:40])
        slow.send(*(message(f"SLOW-{n}", patient=f"S{n}") for n in range(100)))  # 10 MB of answers, none of them read
        started = time.monotonic()
        for n in range(100):
            assert good.ask(message(f"NICE-{n}", patient=f"N{n}")) == ("AA", f"NICE-{n}")
        assert time.monotonic() - started < 5
        stalled.send_raw(message("STALLED").encode()[40:] + b"\x1c\r")
        assert stalled.ack() == ("AA", "STALLED")
        assert sorted(slow.ack()[1] for _ in range(100)) == sorted(f"SLOW-{n}" for n in range(100))


def test_sixteen_connections_each_get_their_own_answers(here):
    problems = []

    def run(number):
        with here.device("MANY") as device:
            for n in range(40):
                control = f"C{number}-{n}"
                if device.ask(message(control, patient=control)) != ("AA", control):
                    problems.append(control)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not problems
    assert {f"C{c}-{n}" for c in range(16) for n in range(40)} <= set(here.sandbox.ids())


def test_a_one_megabyte_message_arrives(here):
    with here.device("ENHANCED") as device:
        text = message("LARGE-1", size=1_000_000)
        assert device.ask(text) == ("CA", "LARGE-1")
    here.sandbox.wait_ids("LARGE-1")
    assert here.sandbox.of("LARGE-1")[0].body == text


# --- others' messages, and what the logs say about them ---


def corpus():
    """The sample messages by name; a test that needs them skips, loudly, where they are absent."""
    if not CORPUS.is_dir():
        pytest.skip(f"NO SAMPLE MESSAGES: {CORPUS} is absent, so nothing was checked against them")
    return {path.name: path.read_bytes() for path in sorted(CORPUS.glob("*.hl7"))}


def variants(raw):
    """The message as sent, and with each kind of line end."""
    lines = re.split(rb"\r\n|\r|\n", raw)
    return [raw, *(end.join(lines) for end in (b"\r", b"\n", b"\r\n"))]


def as_contract_says(raw):
    """Channel contract 4.2: decoded, runs of CR and LF become one CR, everything else stays."""
    return re.sub("[\r\n]+", "\r", raw.decode("utf-8-sig"))


def patient_words(messages):
    """Control ids and PID-3.1 of more than 4 characters, and parts of PID-5 of more than 3."""
    words = set()
    for raw in messages:
        for segment in as_contract_says(raw).split("\r"):
            fields = segment.split("|")
            if fields[0] == "MSH" and len(fields[9]) > 4:
                words.add(fields[9])
            if fields[0] == "PID":
                ids = [repetition.split("^")[0] for field in fields[3:4] for repetition in field.split("~")]
                names = [part for field in fields[5:6] for part in re.split(r"[~^&]", field)]
                words |= {word for word in ids if len(word) > 4} | {word for word in names if len(word) > 3}
    return words


@pytest.fixture(scope="module")
def after_corpus(tmp_path_factory):
    """A run over every sample message, with Bots that fail now and then, at the most talkative log level."""
    samples = corpus()
    with site(
        tmp_path_factory.mktemp("corpus"),
        {"CORPUS": "?duplicateBehavior=accept", "STRICT": f"?enhanced=true&retryMode=guaranteed&{QUICK}"},
        level="DEBUG",
    ) as here:
        sent = [variant for raw in samples.values() for variant in variants(raw)]
        arrived = []
        with here.device("CORPUS", timeout=20) as device:
            for raw in sent:
                count = len(here.sandbox.seen)
                device.send(raw)
                device.receive_bytes()
                arrived.append([t.body for _, t in here.sandbox.seen[count:]])
        make_trouble(here, list(samples.values()))
        yield here, samples, sent, arrived


def make_trouble(here, messages):
    """Errors of all kinds whose texts could tempt the agent to log a message."""
    names = [as_contract_says(raw) for raw in messages]
    here.sandbox.bot = lambda t: (400, json.dumps({"issue": [{"details": {"text": t.body}}]}))
    with here.device("CORPUS") as device:
        for raw in messages[:10]:
            device.send(raw)
            device.receive_bytes()
        for text in names[:10]:  # neither MSH nor complete
            device.send(text[3:].encode(), text[:200].replace("MSH", "XXX").encode())
        device.receive_bytes()  # what is no message is answered once a second
    here.sandbox.bot = failing(30, bot("AE"))
    with here.device("STRICT") as device:
        for raw in messages[:10]:
            device.send(raw, raw, raw.replace(b"|P|", b"|T|"))
        device.drain(0.5)
    with here.device("CORPUS") as device:
        device.send_raw(b"".join(messages[:5]))  # never a frame
    with here.device("CORPUS") as device:
        device.send_raw(b"\x0b" + messages[0][:300] + b"\x0b" + messages[1] + b"\x1c\r")
        device.drain(0.3)
    here.sandbox.tell(json.dumps({"type": "agent:error", "body": f"Cannot parse {names[0]}"}).encode())
    here.sandbox.tell(json.dumps({"type": names[0]}).encode())
    here.sandbox.tell(
        json.dumps({"type": "agent:transmit:response", "channel": "CORPUS", "callback": names[0]}).encode()
    )
    here.sandbox.tell(names[0].encode())
    here.sandbox.ask("agent:unknown:request", body=names[0])


def test_every_sample_message_arrives_as_the_contract_says(after_corpus):
    _, samples, sent, arrived = after_corpus
    assert len(sent) == 4 * len(samples) >= 4 * 69
    for raw, bodies in zip(sent, arrived, strict=True):
        assert bodies == [as_contract_says(raw)]


def test_no_patient_data_in_main_log_fetched_logs_or_stats(after_corpus):
    here, samples, *_ = after_corpus
    words = patient_words(samples.values())
    assert len(words) > 30
    fetched = here.sandbox.ask("agent:logs:request", limit=1000)
    places = {
        "main log": here.agent.main_log(),
        "standard output": here.agent.output().encode(),
        "$fetch-logs": json.dumps(fetched, ensure_ascii=False).encode(),
        "$stats": json.dumps(here.sandbox.stats(), ensure_ascii=False).encode(),
    }
    asked = {
        "status": {"command": "status"},
        "bundle": {"command": "bundle"},  # doctor and the log's tail are in it
        **{f"queue list {kind}": {"command": "queue", "verb": "list", "what": kind} for kind in medplum_agent.KINDS},
    }
    answers = {place: medplum_agent.ask_agent(here.agent.state_dir, one) or {} for place, one in asked.items()}
    places |= {place: json.dumps(answer, ensure_ascii=False).encode() for place, answer in answers.items()}
    places["metrics"] = medplum_agent.figures(answers["status"]).encode()
    assert b"dead letter" in places["main log"] and answers["queue list dead"]["messages"]
    assert len(log_lines(places["main log"])) > 30
    for place, text in places.items():
        said = text.decode("utf-8", "replace")
        # A number may stand inside another by chance (a port, a time); as a word of its own it is the patient's.
        found = {w for w in words if (re.search(rf"(?<!\d){w}(?!\d)", said) if w.isdigit() else w in said)}
        assert not found, f"{place} names patients: {found}"


def test_files_of_the_state_directory_are_for_the_agents_user_only(after_corpus):
    here, *_ = after_corpus
    files = [path for path in here.agent.state_dir.rglob("*") if path.is_file()]
    assert {"medplum-agent-queue.sqlite", "medplum-agent-queue.sqlite-wal"} <= {path.name for path in files}
    assert any("channels" in path.name for path in files)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert set(modes.values()) == {"0o600"}, modes


def test_samples_arrive_byte_by_byte_too(here):
    (raw, *_) = corpus().values()
    with here.device("ACCEPT") as device:
        for byte in b"\x0b" + raw + b"\x1c\r":
            device.send_raw(bytes([byte]))
        device.ack()
    control = control_id(as_contract_says(raw))
    here.sandbox.wait_ids(control)
    assert here.sandbox.of(control)[-1].body == as_contract_says(raw)


@pytest.mark.parametrize("query", ["", "?enhanced=true&appLevelAck=NE", "?enhanced=aa"])
def test_an_empty_frame_keeps_a_connection_alive_and_is_not_answered(tmp_path, query):
    """Who reads one frame for each message would take its answer for that of the next (channel contract 4.2)."""
    with site(tmp_path, {"A": query}) as here, here.device("A") as device:
        for n in range(3):
            for empty in ("", "\r", " \r\n"):
                device.send(empty)
            device.send(message(f"ALIVE-{n}"))
            assert device.ack()[1] == f"ALIVE-{n}"
        assert b'"WARN"' not in here.agent.main_log()


def test_what_acknowledges_our_answers_holds_up_no_patient(tmp_path):
    """An enhanced device answers the AA with CA; without a patient that would be a barrier."""
    with site(tmp_path, {"A": "?enhanced=true"}) as here, here.device("A") as device:
        here.agent.wait_connected()
        here.sandbox.faults.silent = True
        for n in range(20):
            device.send(f"MSH|^~\\&|D|H|A|B|20260101||ACK|CA-{n}|P|2.5\rMSA|CA|{n}\r")
        device.send(message("FREE-1", patient="P1"))
        assert device.ack() == ("CA", "FREE-1")
        here.sandbox.wait_ids("FREE-1", timeout=5)
