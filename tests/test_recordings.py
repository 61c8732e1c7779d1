"""What recordings of real devices showed when they were played: messages of our own with the same traits."""

import hl7
import pytest
from demo import accepting_bot

from tests.support import control_id, message, site

QUERIES = {
    "a monitor": "QBP^ZV1^QBP_Q21|7|P|2.6\rQPD|IHE PDQ Query|QueryTag_8|@PID.3.1^10003\rRCP|I|50^RD\r",
    "an analyzer": "QRY^Q02|7|P|2.3.1\rQRD||R|D|1|||RD|TUBE-1|OTH|||T\rQRF||||||RCT|COR|ALL\r",
    "a hematology analyzer": "ORM^O01|7|P|2.3.1||||||UNICODE\rORC|RF||TUBE-1||IP\r",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(
        tmp_path_factory.mktemp("recordings"), {"HL7": "", "STORED": "?enhanced=aa", "ENHANCED": "?enhanced=true"}
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def bot(here):
    here.sandbox.bot = accepting_bot


# --- control ids that say little ---


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_a_query_that_is_asked_again_hears_what_is_known_now(here, query):
    """It counts its messages from 1 at each start. For 24 hours it heard that there were no orders, as at first."""
    known = ["NF", "OK"]
    here.sandbox.bot = lambda transmit: (200, f"MSH|^~\\&|B\rMSA|AA|{control_id(transmit.body)}\rQAK||{known.pop(0)}\r")
    first, later = (f"MSH|^~\\&|BC-780|WARD|||{when}||{query}" for when in ("20261001090000", "20261001101500"))
    heard = []
    for text in (first, later, later):  # the last is a repetition
        with here.device("HL7") as device:
            device.send(text)
            heard.append(device.receive().split("QAK||")[1].strip())
    assert heard == ["NF", "OK", "OK"]


@pytest.mark.parametrize("connections", ["one", "one each"])
def test_a_value_that_comes_back_is_no_repetition(here, connections):
    """Monitors name the kind of a message in MSH-10 (204: values), and give no time: a pulse that was 60 before was
    acknowledged, and never reached the server."""
    app = f"MON-{connections}"
    head = f"MSH|^~\\&|{app}||||||ORU^R01|204|P|2.3.1"
    texts = [f"{head}\rOBX||NM|101^HR||{pulse}||||||F\r" for pulse in (60, 61, 60, 61)]

    def arrived() -> list[str]:
        return [transmit.body for _, transmit in list(here.sandbox.seen) if f"|{app}|" in transmit.body]

    device = here.device("STORED")
    for text in texts:
        if connections == "one each":
            device.close()
            device = here.device("STORED")
        assert device.ask(text) == ("AA", "204")
    device.close()
    with here.device("STORED") as again:  # it did not hear the last AA
        assert again.ask(texts[-1]) == ("AA", "204")
        here.agent.logged("came again from")
    here.sandbox.wait_for(lambda: len(arrived()) == len(texts))
    assert arrived() == texts
    said = [line for line in here.agent.main_log().splitlines() if b"with other content" in line]
    assert sum(b"'STORED'" in line for line in said) == 1  # however often it connects


def test_a_refill_is_no_query(here):
    """ORC-1 is RF there, too (table 0119): stamped anew for its repetition, the prescription came twice."""
    for when in ("20261001090000", "20261001090007"):
        with here.device("STORED") as device:
            order = "RDE^O11|REFILL|P|2.5.1\rORC|RF|ORDER-1\rRXE||DRUG\r"
            assert device.ask(f"MSH|^~\\&|PHARMACY|WARD|||{when}||{order}") == ("AA", "REFILL")
    with here.device("STORED") as device:
        device.ask(message("REFILL-END"))
    here.sandbox.wait_ids("REFILL-END")
    assert len([1 for _, transmit in here.sandbox.seen if "|REFILL|" in transmit.body]) == 1


def test_a_message_that_comes_again_with_its_time_is_a_repetition(here):
    """Of two devices behind one address that count alike, each had lost an acknowledgment: all came twice and more."""
    texts = [f"MSH|^~\\&|NAT||||{n}||ORU^R01|1|P|2.3.1\rOBX||NM|101^HR||{n}||||||F\r" for n in (2025, 2026)]
    for text in texts + texts + texts:
        with here.device("STORED") as device:
            assert device.ask(text) == ("AA", "1")
    with here.device("STORED") as device:
        device.ask(message("NAT-END"))
    here.sandbox.wait_ids("NAT-END")
    assert [transmit.body for _, transmit in here.sandbox.seen if "|NAT|" in transmit.body] == texts


def test_a_value_that_comes_back_among_many_messages(here):
    """What control ids had named was forgotten all at once, and the next value taken for what it had been before."""
    blocks, said = 24, "MSH|^~\\&|BUSY||||||ORU^R01|204|P|2.3.1\rOBX||NM|101^HR||{}||||||F\r"
    with here.device("STORED") as device:
        for n in range(blocks):
            device.send(*(message(f"BUSY-{n}-{k}") for k in range(100)), said.format(60 + n % 2))
            for _ in range(101):
                device.ack()
    arrived = lambda: [1 for _, transmit in list(here.sandbox.seen) if "|BUSY|" in transmit.body]  # noqa: E731
    here.sandbox.wait_for(lambda: len(arrived()) == blocks)


# --- batches ---


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize(("channel", "code"), [("HL7", "AA"), ("STORED", "AA"), ("ENHANCED", "CA")])
def test_a_batch_without_messages_is_taken(here, channel, code, end):
    """Of a night in which nothing happened: it was refused, as it does not start with MSH, and came again."""
    before = here.agent.main_log().count(b"WARN")
    with here.device(channel) as device:
        device.send(end.join(["FHS|^~\\&|LAB|WARD|||2026", "BHS|^~\\&|LAB|WARD|||2026", "BTS|0", "FTS|1", ""]))
        answer = device.receive()
        device.send("BHS|^~\\&|LAB\rPID|1||P1\rBTS|1\r")  # not empty, and no message
        assert device.ack()[0] == code[0] + "R"
    assert hl7.parse(answer).segment("MSA")[1] == [code]
    assert str(hl7.parse(answer)["MSH.F5"]) == "LAB"
    assert here.agent.main_log().count(b"WARN") == before + 1
