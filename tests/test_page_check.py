"""Checks of visitors: hostile zips and questions, limits, turns, stopping; no server here (see test_page.py)."""

import io
import json
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processors import photo, processor, speaking_model

from adafv.asking.failures import UsageError
from adafv.asking.session import Session
from adafv.errors import AdaFVError
from adafv.evaluation.answers import Asker, configurations
from adafv.evaluation.questions import BadRecordsError, QuestionsError, read_questions
from adafv.evaluation.store import Store
from adafv.page import archive as archive_module
from adafv.page import checks as checks_module
from adafv.page.answers import Answers
from adafv.page.archive import ArchiveError, unpack
from adafv.page.checks import REPORT, RESULT, Check, Checks, Settings
from adafv.page.uploads import Uploads

SECONDS = 60.0


def png(number: int = 0) -> bytes:
    data = io.BytesIO()
    photo(number).save(data, "PNG")
    return data.getvalue()


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], packed: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", packed) as made:
        for name, content in members:
            made.writestr(name, content, None if isinstance(name, zipfile.ZipInfo) else packed)
    return data.getvalue()


def member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def encrypted(data: bytes) -> bytes:
    """The flag set in both headers of the only member."""
    changed = bytearray(data)
    changed[6] |= 1
    changed[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: zipped(("../x.png", png())), "may lead out of it"),
    "parent inside": (lambda: zipped(("a/../../x.png", png())), "may lead out of it"),
    "absolute": (lambda: zipped(("/tmp/x.png", png())), "may lead out of it"),
    "drive": (lambda: zipped(("C:/x.png", png())), "may lead out of it"),
    "backslash": (lambda: zipped(("..\\x.png", png())), "may lead out of it"),
    "NUL": (lambda: patched(zipped(("a.png_b.png", png())), b"a.png_b.png", b"a.png\0b.png"), "may lead out of it"),
    "line break": (lambda: zipped(("a\nb.png", png())), "may lead out of it"),
    "long": (lambda: zipped(("x" * 300 + ".png", png())), "shorten it"),
    "deep": (lambda: zipped(("x/" * 20 + "x.png", png())), "shorten it"),
    "link": (lambda: zipped((member("x.png", 0o120777), b"/etc/passwd")), "has the link x.png"),
    "link to a folder": (lambda: zipped((member("x", 0o120777), b"/etc"), ("x/passwd.png", b"")), "has the link x"),
    "FIFO": (lambda: zipped((member("x.png", 0o010644), b"")), "is no file"),
    "device": (lambda: zipped((member("x.png", 0o020644), b"")), "is no file"),
    "twice": (lambda: zipped(("x.png", png()), ("x.png", png(1))), "name x.png twice"),
    "twice but for the case": (lambda: zipped(("x.png", png()), ("X.PNG", png(1))), "twice"),
    "encrypted": (lambda: encrypted(zipped(("x.png", png()))), "encrypted"),
    "nested": (lambda: zipped(("x.png", png()), ("more.zip", zipped(("y.png", png())))), "has the archive more.zip"),
    "nested by another name": (lambda: zipped(("x.png", zipped(("y.png", png())))), "x.png of the zip is an archive"),
    "gzip by another name": (lambda: zipped(("x.png", b"\x1f\x8b" + bytes(99))), "x.png of the zip is an archive"),
    "packed oddly": (lambda: zipped(("x.png", png()), packed=zipfile.ZIP_LZMA), "packed in an unusual way"),
    "no picture": (lambda: zipped(("x.txt", b"x")), "has no picture"),
    "empty zip": (lambda: zipped(), "has no picture"),
    "no zip": (lambda: png(), "is no zip"),
    "nothing": (lambda: b"", "is no zip"),
    "cut short": (lambda: zipped(("x.png", png()))[:-30], "is no zip"),
    "something behind it": (lambda: zipped(("x.png", png())) + b"x", "is no zip, or has something behind its end"),
    "damaged": (lambda: patched(zipped(("x.png", bytes(2000)), packed=0), bytes(500), b"x" * 500), "is damaged"),
    "bomb": (lambda: zipped(("x.png", bytes(11 * 2**20))), "larger than 10 MB"),
    "many bombs": (lambda: zipped(*((f"{n}.png", bytes(10 * 2**20)) for n in range(3))), "more than 20 MB unpacked"),
    "many members": (lambda: zipped(*((f"{n}/", b"") for n in range(2001))), "more than 2,000 members"),
    "many members that it does not admit": (lambda: hidden(2001), "more than 2,000 members"),
    "zip64": (lambda: zip64(), "zip64"),
}


def hidden(count: int) -> bytes:
    """A zip whose end claims one member."""
    data = bytearray(zipped(*((f"{n}/", b"") for n in range(count))))
    struct.pack_into("<2H", data, len(data) - 14, 1, 1)
    return bytes(data)


def zip64() -> bytes:
    data = zipped(("x.png", png()))
    return data[:-22] + b"PK\x06\x07" + bytes(16) + data[-22:]


class TestZips:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refused(self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive_module, "MAX_UNPACKED", 20 * archive_module.MEGABYTE)
        make, said = HOSTILE[kind]
        inside = tmp_path / "outer" / "inside"
        inside.mkdir(parents=True)
        with pytest.raises(ArchiveError) as error:
            unpack(io.BytesIO(make()), inside)
        assert said in str(error.value)
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)
        assert [path for path in tmp_path.rglob("*") if path.is_symlink() or inside not in (path, *path.parents)] == [
            tmp_path / "outer"
        ]

    def test_sizes_that_are_not_true(self, tmp_path: Path) -> None:
        """What comes out counts, not what is claimed."""
        data = bytearray(zipped(("x.png", bytes(1000))))
        for place in (22, data.index(b"PK\x01\x02") + 24):
            struct.pack_into("<I", data, place, 10)
        with pytest.raises(ArchiveError, match="damaged"):
            unpack(io.BytesIO(bytes(data)), tmp_path)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10

    def test_what_people_send(self, tmp_path: Path) -> None:
        """Folders, a system's own files, the questions beside the pictures, letters of all kinds."""
        names = ("pics/a.png", "pics/deep/b.JPG", "pics/ü.webp")
        others = ("pics/", "__MACOSX/pics/._a.png", "pics/._a.png", "pics/.DS_Store", "questions.jsonl")
        unpack(io.BytesIO(zipped(*((name, png()) for name in names), *((name, b"") for name in others))), tmp_path)
        found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert found == set(names)


class TestWithin:
    """Questions of strangers name pictures of their own, and nothing else on the disk."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "given"
        (folder / "images").mkdir(parents=True)
        for path in (folder / "a.png", folder / "images" / "b.png", tmp_path / "secret.png"):
            path.write_bytes(png())
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        (folder / "inner.png").symlink_to(folder / "a.png")
        (folder / "up").symlink_to(tmp_path)
        return folder

    def read(self, folder: Path, image: Any) -> Any:
        path = folder.parent / "q.jsonl"
        path.write_text(json.dumps({"image": image, "question": "What?"}))
        return read_questions(path, within=folder)

    @pytest.mark.parametrize("image", ["a.png", "./a.png", "images/b.png", "b.png"])
    def test_inside(self, folder: Path, image: str) -> None:
        (question,) = self.read(folder, image).questions
        assert question.picture.digest()
        assert question.picture.name == image

    def test_the_only_folder_of_a_zip(self, tmp_path: Path) -> None:
        (tmp_path / "given" / "pics").mkdir(parents=True)
        (tmp_path / "given" / "pics" / "a.png").write_bytes(png())
        assert len(self.read(tmp_path / "given", "a.png").questions) == 1

    @pytest.mark.parametrize(
        "image",
        [
            *(
                "/etc/passwd",
                "../secret.png",
                "images/../../secret.png",
                "..",
                "link.png",
                "inner.png",
                "up/secret.png",
            ),
            *(
                "C:\\secret.png",
                "\\\\host\\share\\x.png",
                "..\\secret.png",
                "a.png\0.png",
                "",
                " ",
                ".",
                "images",
                "~/x.png",
            ),
            *("http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "x" * 5000, "\ud800"),
            *(7, None, True, ["a.png"], {"path": "/etc/passwd"}),
        ],
        ids=lambda value: repr(value)[:20],
    )
    def test_outside(self, folder: Path, image: Any) -> None:
        found = self.read(folder, image)
        assert found.questions == []
        (bad,) = found.bad
        assert bad.where == "q.jsonl line 1"
        assert len(bad.problem) < 400

    def test_absolute_and_inside(self, folder: Path) -> None:
        assert self.read(folder, str(folder / "a.png")).questions == []

    def test_a_folder_is_no_source(self, folder: Path) -> None:
        with pytest.raises(QuestionsError):
            read_questions(folder, within=folder)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(speaking_model("llava"), processor("llava"))


class Place:
    """A folder of uploads with checks in it."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.folder = folder
        self.answers = Answers(session, Uploads(folder))
        self.checks = Checks(session, "tiny", self.answers.turns, Uploads(folder), folder)

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def questions(self, count: int, *more: Any, name: str = "q.jsonl") -> str:
        records = [{"image": f"{n % 4}.png", "question": f"Number {n}?", "id": f"n{n}"} for n in range(count)]
        lines = [each if isinstance(each, str) else json.dumps(each) for each in (*records, *more)]
        return self.file(name, "\n".join(lines).encode())

    def pictures(self, *more: tuple[str, bytes]) -> str:
        return self.file("p.zip", zipped(*((f"{n}.png", png(n)) for n in range(4)), *more))

    def begin(self, count: int = 6, *more: Any, visitor: str = "me", **changes: Any) -> Check:
        return self.checks.begin(visitor, self.questions(count, *more), self.pictures(), settings(**changes))

    def left(self) -> list[str]:
        """What checks have left behind."""
        return sorted(path.name.partition("-")[0] for path in self.folder.iterdir() if path.is_dir())


@pytest.fixture
def place(session: Session, tmp_path: Path) -> Iterator[Place]:
    made = Place(session, tmp_path)
    yield made
    made.checks.close()


def settings(**changes: Any) -> Settings:
    wish = {"keep": "50%, 25%", "methods": ["adafv"], "max_loss": 1, "bad_records": "refuse", "by": "auto"}
    return Settings.of(**{**wish, "suffix": None, "longest": 4, **changes})


def ended(check: Check) -> Check:
    until = time.monotonic() + SECONDS
    while not check.ended:
        assert time.monotonic() < until
        time.sleep(0.01)
    return check


class TestChecks:
    def test_the_same_as_alone(self, place: Place, session: Session, tmp_path: Path) -> None:
        check = ended(place.begin())
        assert check.error is None
        assert check.phase == "done"
        assert place.left() == ["report"]
        assert check.report is not None
        found = json.loads((check.report / RESULT).read_text())
        assert found == check.result
        assert (check.report / REPORT).read_text().startswith("<!doctype html>")
        assert str(tmp_path) not in (check.report / RESULT).read_text() + (check.report / REPORT).read_text()
        alone = tmp_path / "alone"
        alone.mkdir()
        unpack((tmp_path / "p.zip").open("rb"), alone)
        questions = read_questions(tmp_path / "q.jsonl", within=alone)
        ways = configurations(["adafv"], ["50%", "25%"])
        asker = Asker(session, max_new_tokens=4)
        with Store(tmp_path / "store", asker.fingerprint()) as store:
            _, keys = asker.run(questions, ways, store, batch=4)
            same = [
                sum(
                    store.get(key, way.way).answer == store.get(key, ways[0].way).answer  # type: ignore[union-attr]
                    for key in keys.values()
                )
                / 6
                for way in ways[2:]
            ]
        assert [row["agreement"]["mean"] for row in found["rows"]] == pytest.approx(same, abs=1e-6)

    def test_bad_records(self, place: Place) -> None:
        more = [
            {"image": "../x.png", "question": "What?"},
            "{",
            {"image": "0.png", "question": "x" * 3000},
            {"image": "text.png", "question": "What?"},
            {"image": "large.png", "question": "What?"},
            {"image": "cut.png", "question": "What?"},
        ]
        from test_page import claims

        pictures = place.pictures(
            ("text.png", b"I am a text."), ("large.png", claims(5000, 5000)), ("cut.png", png()[: len(png()) // 2])
        )
        questions = place.questions(6, *more)
        with pytest.raises(BadRecordsError) as error:
            place.checks.begin("me", questions, pictures, settings())
        said = [str(bad) for bad in error.value.bad]
        for number, part in ((7, "leads out"), (8, "is not JSON"), (9, "3,000 letters"), (10, "not a picture")):
            assert any(f"q.jsonl line {number}: " in each and part in each for each in said)
        assert any("5000 x 5000 pixels, more than the 16 million" in each for each in said)
        assert place.left() == []
        check = ended(place.checks.begin("me", questions, pictures, settings(bad_records="skip")))
        assert check.result is not None
        assert check.result["questions"]["count"] == 6
        assert len(check.result["questions"]["left_out"]) == 6

    def test_a_picture_that_breaks_later(self, place: Place) -> None:
        pictures = place.pictures(("cut.png", png()[: len(png()) // 2]))
        questions = place.questions(6, {"image": "cut.png", "question": "What?"})
        check = ended(place.checks.begin("me", questions, pictures, settings()))
        assert check.phase == "failed"
        assert isinstance(check.error, BadRecordsError)
        assert "choose to leave such records out" in str(check.error)
        assert "q.jsonl line 7" in str(check.error.bad[0])
        assert place.left() == []

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"keep": "all"}, "prunes nothing"),
            ({"keep": "ten"}, "is not a budget"),
            ({"keep": "1,2,3,4,5,6,7"}, "6 at most"),
            ({"keep": None}, "is not a budget"),
            ({"methods": None}, "choose a method"),
            ({"methods": []}, "choose a method"),
            ({"methods": ["guess"]}, "guess"),
            ({"methods": [7]}, "no method 7"),
            ({"methods": ["adafv:text=all"]}, "known are"),
            ({"methods": ["random:seed=1" + "0" * 200]}, "letters"),
            ({"methods": ["adafv", "text", "saliency", "random", "uniform"]}, "4 at most"),
            ({"max_loss": 0}, "between 0 and 100"),
            ({"max_loss": float("nan")}, "between 0 and 100"),
            ({"max_loss": "1"}, "between 0 and 100"),
            ({"max_loss": True}, "between 0 and 100"),
            ({"bad_records": "keep"}, "no such choice"),
            ({"by": 7}, "no such choice"),
            ({"suffix": "x" * 300}, "200 letters"),
            ({"suffix": 7}, "200 letters"),
            ({"suffix": "\ud800"}, "half a letter"),
            ({"longest": 1000}, "1 to 128"),
        ],
    )
    def test_settings_that_are_refused(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises((UsageError, AdaFVError)) as error:
            settings(**changes)
        assert said in str(error.value)

    def test_files_that_are_refused(self, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        good, zips = place.questions(2), place.pictures()
        outside = tmp_path.parent / "outside.jsonl"
        outside.write_text("{}")
        for questions, pictures, said in (
            (None, zips, "choose a file of questions"),
            (good, None, "choose a zip"),
            ("/etc/passwd", zips, "the file of questions is no longer there"),
            (str(outside), zips, "the file of questions is no longer there"),
            (good, "/etc/passwd", "the zip is no longer there"),
            (good, 7, "the zip is no longer there"),
            (good, good, "is no zip"),
            (zips, zips, "give a .jsonl or .csv file"),
            (place.file("e.jsonl", b""), zips, "is empty"),
            (place.file("b.jsonl", b"\xff\xfe"), zips, "is not UTF-8"),
            (place.file("l.jsonl", b" " * (checks_module.MAX_FILE + 1)), zips, "larger than 4 MB"),
            (place.questions(checks_module.MAX_RECORDS + 1, name="m.jsonl"), zips, "give 2,000 at most"),
        ):
            with pytest.raises((UsageError, AdaFVError)) as error:
                place.checks.begin("me", questions, pictures, settings())
            assert said in str(error.value)
            assert str(tmp_path) not in str(error.value)
            assert place.left() == []
        monkeypatch.setattr(checks_module, "MAX_ANSWERS", 7)
        with pytest.raises(UsageError, match="are 8 answers; 7 at most"):
            place.checks.begin("me", good, zips, settings())

    def test_a_budget_that_prunes_nothing(self, place: Place) -> None:
        check = ended(place.begin(keep="1000, 25%"))
        assert "keep 1000 prunes nothing" in str(check.error)
        assert place.left() == []

    def test_the_row(self, place: Place) -> None:
        """One works, some wait, one each; whoever stops makes room."""
        with place.answers.turns.turn():
            checks = [place.begin(2, visitor=f"visitor {number}") for number in range(1 + checks_module.MOST_WAITING)]
            with pytest.raises(UsageError, match="3 checks wait already"):
                place.begin(visitor="another")
            with pytest.raises(UsageError, match="a check of yours"):
                place.begin(visitor="visitor 2")
            assert [place.checks.ahead_of(check) for check in checks] == [0, 1, 2, 3]
            place.checks.stop("visitor 1")
            place.checks.stop("nobody")
        assert [ended(check).phase for check in checks] == ["done", "stopped", "done", "done"]
        assert place.left() == ["report"] * 3
        assert not place.checks._row

    def test_stopped_at_work(self, place: Place) -> None:
        check = place.begin(200)
        while not check.asked:
            time.sleep(0.01)
        place.checks.stop("me")
        assert ended(check).phase == "stopped"
        assert check.done < check.total
        assert check.result is None
        assert place.left() == []

    def test_nobody_looks(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks_module, "LEASE", 0.2)
        assert ended(place.begin(500)).phase == "stopped"

    def test_too_long(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks_module, "MAX_SECONDS", 0.3)
        check = ended(place.begin(500))
        assert "of 2,000 answers given" in str(check.error)
        assert place.left() == []

    def test_questions_in_between(self, place: Place, session: Session) -> None:
        """A question waits for one step of a check, not for its end; and the check comes to the same."""
        expected = ended(place.begin(16, visitor="before")).result
        picture = place.file("picture.png", png(9))
        check = place.begin(16)
        while not check.asked:
            time.sleep(0.005)
        assert len(place.answers.compare(picture, "What is it?", "25%", ["adafv"], 2).results) == 2
        assert not check.ended
        assert ended(check).result == expected
        assert check.waited > 0

    def test_answers_in_the_order_of_coming(self, place: Place) -> None:
        order: list[int] = []
        turns = place.answers.turns

        def come(number: int) -> None:
            with turns.turn():
                order.append(number)

        threads = [threading.Thread(target=come, args=(number,)) for number in range(6)]
        with turns.turn() as turn:
            for number, thread in enumerate(threads):
                thread.start()
                while len(turns._waiting) <= number:
                    time.sleep(0.001)
            turn.pass_on()
            assert order == list(range(6))
        for thread in threads:
            thread.join()
