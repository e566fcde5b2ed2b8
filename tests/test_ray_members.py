"""Members in actors of a real Ray on this machine: texts, one call a step, placements, and what is lost."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray_cluster import actors_alive, in_actor, kill_process, until
from tiny_models import one_byte_tokens, save_model
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError, ModelError, load_member
from deepen_ext.cluster import actors
from deepen_ext.commands.cli import app
from deepen_ext.errors import MemberLost, OutOfMemory
from deepen_ext.members.loading import load_members
from deepen_ext.members.member import Member
from deepen_ext.members.ray.actor import MemberActor
from deepen_ext.members.ray.remote import RemoteMember
from deepen_ext.members.ray.wire import NewIds, Request, pack_request, unpack_request
from deepen_ext.members.top_k_only import TopKOnly

ROOT = Path(__file__).parent.parent
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "L'été dernier,", "1, 2, 3,"]
SMALL = {"num_cpus": 0}


pytestmark = pytest.mark.usefixtures("real_ray")


def hidden(member: Member) -> Member:
    return replace(member, backend=TopKOnly(member.backend, member.vocab_size))


@pytest.fixture(scope="module")
def here(one_byte_folders: list[Path]) -> Ensemble:
    """In this process, by the fuser that is the default where a member has no logits."""
    return Ensemble.from_pretrained(one_byte_folders, fuser="deepen", learning_rate=0.5)


@pytest.fixture(scope="module")
def there(one_byte_folders: list[Path]) -> Ensemble:
    """The assistant in an actor."""
    return Ensemble.from_pretrained(one_byte_folders, placement=[None, SMALL], learning_rate=0.5)


@pytest.fixture(scope="module")
def both(one_byte_folders: list[Path]) -> Ensemble:
    return Ensemble.from_pretrained(one_byte_folders, placement=SMALL, learning_rate=0.5)


@pytest.fixture
def lonely(one_byte_folders: list[Path]) -> Iterator[Ensemble]:
    """An ensemble whose assistant's actor a test may end."""
    found = Ensemble.from_pretrained(one_byte_folders, placement=[None, SMALL])
    yield found
    found.members[1].backend.close()


def sessions_of(ensemble: Ensemble, member: int = 1) -> int:
    return in_actor(actor_of(ensemble, member), lambda self: len(self._sessions))


def actor_of(ensemble: Ensemble, member: int = 1) -> Any:
    return ensemble.members[member].backend.actor  # type: ignore[attr-defined]


def fail(actor: Any, error: Exception) -> None:
    """Its forward passes raise this until `mend`."""

    def broken(self: MemberActor) -> None:
        def hook(*_: object) -> None:
            raise error

        self.hook = self.member.model.model.layers[-1].register_forward_pre_hook(hook)  # type: ignore

    in_actor(actor, broken)


def mend(actor: Any) -> None:
    in_actor(actor, lambda self: self.hook.remove())


def texts(ensemble: Ensemble, **settings: Any) -> list[list[int]]:
    found = ensemble.generate(PROMPTS, **{"max_new_tokens": 24, **settings})
    return [one.token_ids for one in found]


class TestTexts:
    def test_the_assistant_has_a_say(self, here: Ensemble) -> None:
        assert sum(one.changed_tokens for one in here.generate(PROMPTS, max_new_tokens=24)) > 3

    @pytest.mark.parametrize(
        "settings",
        [
            {"draft": 0},
            {"draft": 3},
            {"draft": 4, "drafter": "tiny-2"},
            {"do_sample": True, "seed": 5, "temperature": 1.5},
            {"batch_size": 2},
            {"certified_skip": True},
        ],
        ids=str,
    )
    def test_as_in_process(self, here: Ensemble, there: Ensemble, settings: dict[str, Any]) -> None:
        assert texts(there, **settings) == texts(here, **settings)
        assert sessions_of(there) == 0

    def test_another_fuser(self, here: Ensemble, there: Ensemble) -> None:
        assert texts(there.variant(fuser="average")) == texts(here.variant(fuser="average"))

    @pytest.mark.parametrize(
        "settings", [{"fuser": "draw"}, {"fuser": "union-vocab"}, {"weights": "prompt"}], ids=str
    )
    def test_what_needs_logits_is_refused(self, there: Ensemble, settings: dict[str, Any]) -> None:
        ((name, value),) = settings.items()
        with pytest.raises(InputError, match=f"tiny-2: {name}='{value}' needs .*'logits'"):
            there.variant(**settings)

    def test_the_main_model_in_an_actor(self, here: Ensemble, both: Ensemble) -> None:
        """Of its logits only what the top-k tells is known."""
        same = Ensemble([hidden(one) for one in here.members], learning_rate=0.5)
        assert texts(both) == texts(same)
        sampled = {"do_sample": True, "top_k": 20, "seed": 4, "temperature": 1.3}
        assert texts(both, **sampled) == texts(same, **sampled)

    def test_what_it_says_of_itself(self, here: Ensemble, there: Ensemble) -> None:
        inside, outside = here.members[1], there.members[1]
        assert outside.name == inside.name
        assert outside.eos_ids == inside.eos_ids
        assert outside.context_length == inside.context_length
        assert outside.vocabulary.fingerprint == inside.vocabulary.fingerprint
        assert outside.backend.fingerprint() == inside.backend.fingerprint()
        assert there.backends[1] == f"ray {ray.__version__}: {here.backends[1]}"
        assert in_actor(actor_of(there), lambda _: os.getpid()) != os.getpid()

    def test_recipes_that_need_embeddings(self, there: Ensemble) -> None:
        with pytest.raises(InputError, match=r"tiny-2.*recipe='bytes'"):
            there.variant(recipe="calibrated")

    def test_from_the_command_line(self, here: Ensemble, one_byte_folders: list[Path]) -> None:
        models = [option for folder in one_byte_folders for option in ("--model", str(folder))]
        places = ["--placement", "-", "--placement", json.dumps(SMALL)]
        result = CliRunner().invoke(
            app, ["generate", "--prompt", PROMPTS[0], *models, *places, "--max-new-tokens", "8", "--json"]
        )
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        wanted = Ensemble(here.members, fuser="deepen").generate(PROMPTS[0], max_new_tokens=8)
        assert found["text"] == wanted.text


def test_llama_cpp_in_an_actor() -> None:
    """The embedded file, with its tokenizer from the file here."""
    name = "demo:smollm2-135m-instruct"
    member = load_member(name, placement={"num_cpus": 1}, backend="llama.cpp")
    alone = load_member(name, backend="llama.cpp", threads=1)
    assert not member.backend.capabilities.repeatable
    ids = member.vocabulary.encode("The capital of France is")
    with member.backend.open() as one, alone.backend.open() as other:  # type: ignore[attr-defined]
        found, wanted = (session.ask({0: ids}, 8).wait().topk for session in (one, other))
    assert found.ids.tolist() == wanted.ids.tolist()
    torch.testing.assert_close(found.probs, wanted.probs)
    member.backend.close()


class TestCalls:
    def test_one_a_step(self, there: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the lanes and the draft; each carries what is new."""
        calls: list[tuple[str, int]] = []
        call = RemoteMember.call

        def counted(member: RemoteMember, method: str, *args: Any) -> Any:
            calls.append((method, len(args[0]) if method == "ask" else 0))
            return call(member, method, *args)

        monkeypatch.setattr(RemoteMember, "call", counted)
        for settings in ({"draft": 0}, {"draft": 3}):
            calls.clear()
            run = there.start(PROMPTS, max_new_tokens=20, min_new_tokens=20, **settings)
            steps = sum(1 for _ in run)
            run.close()
            asked = [size for method, size in calls if method == "ask"]
            # With drafts also before every token that the main model writes ahead, and once in the end.
            assert len(asked) <= steps * (settings["draft"] + 2 if settings["draft"] else 1)
            assert [method for method, _ in calls if method not in ("ask", "set_aside", "release")] == [
                "open",
                "close",
            ]
            # The first has the prompts. Later ones have 12 bytes, 16 a lane, 4 for each id that is new.
            lanes, ids = len(PROMPTS), len(PROMPTS) * 20 * (1 + settings["draft"])
            assert 0 < sum(asked[1:]) <= len(asked[1:]) * (12 + 16 * lanes) + 4 * ids

    def test_what_a_call_carries(self) -> None:
        request = Request(7, 128, [NewIds(0, 5, [1, 2, 3], 2), NewIds(3, 0, [], 1), NewIds(1, 9, [4], 1)])
        data = pack_request(request)
        assert len(data) == 12 + 16 * 3 + 4 * 4
        assert unpack_request(data) == request


class TestLost:
    def test_killed_in_the_middle_of_a_text(self, lonely: Ensemble) -> None:
        """What was written is there, nothing hangs, and later calls say it too."""
        expected = Ensemble(lonely.members).generate(PROMPTS[0], max_new_tokens=40, draft=0).text
        began = time.monotonic()
        with lonely.stream(PROMPTS[0], max_new_tokens=300, draft=0) as stream:
            for _ in range(3):
                next(stream)
            kill_process(actor_of(lonely))
            with pytest.raises(MemberLost, match=r"^tiny-2: its actor has died.*on_failure") as caught:
                list(stream)
        assert time.monotonic() - began < 20
        assert caught.value.member == "tiny-2"
        assert str(caught.value).count("on_failure") == 1
        written = stream.result.text
        assert len(written) > 2
        assert expected.startswith(written[: len(expected)])
        with pytest.raises(MemberLost, match="tiny-2"):
            lonely.generate(PROMPTS[0])

    def test_the_others_go_on(self, lonely: Ensemble) -> None:
        """With on_failure="continue", after kill -9: the result and the trace say from where on."""
        ensemble = lonely.variant(on_failure="continue")
        whole = ensemble.generate(PROMPTS[0], max_new_tokens=24, draft=0).token_ids
        records: list[dict[str, Any]] = []
        run = ensemble.start(PROMPTS[0], max_new_tokens=24, draft=0, trace=records.append)
        for _ in range(6):
            next(iter(run))
        kill_process(actor_of(lonely))
        with pytest.warns(UserWarning, match="tiny-2: its actor has died.*; the others go on without it"):
            list(run)
        (found,) = run.results()
        at = found.lost["tiny-2"]
        assert 6 <= at < 24  # inside a character nobody is asked
        assert len(found.token_ids) == 24
        assert found.token_ids[:at] == whole[:at]
        assert [one["lost"] for one in records] == [[]] * at + [["tiny-2"]] * (24 - at)
        assert all(one["token"] == one["main_choice"] for one in records[at:])

    def test_a_time_limit(self, one_byte_folders: list[Path], tmp_path: Path) -> None:
        """A busy actor ends the text in time; when it is free the next text works."""
        ensemble = Ensemble.from_pretrained(one_byte_folders, placement=[None, SMALL], timeout=3)
        wanted = texts(ensemble)
        free = tmp_path / "free"
        blocked = actor_of(ensemble).__ray_call__.remote(lambda _: until(free.exists, 120))
        with pytest.raises(MemberLost, match="no answer within 3 seconds; when it is free"):
            ensemble.generate(PROMPTS[0])
        assert ray.wait([blocked], timeout=0) == ([], [blocked])
        free.touch()
        ray.get(blocked)
        assert texts(ensemble) == wanted
        assert sessions_of(ensemble) == 0
        ensemble.members[1].backend.close()

    def test_a_thousand_faults_leave_nothing(self, there: Ensemble) -> None:
        """Forwards that fail, sessions that are dropped, readings that are left half way."""
        actor, backend = actor_of(there), there.members[1].backend
        wanted = texts(there)
        before = len(os.listdir("/proc/self/fd"))

        faults = 0
        ids = list(range(10, 80))
        for number in range(250):
            session = backend.open(2)
            session.ask({0: ids[:20], 1: ids[:30]}, 5).wait()
            fail(actor, RuntimeError("out of luck"))
            for targets in ({0: ids[:25]}, {1: ids[:9]}):
                with pytest.raises(ModelError, match=r"^tiny-2: .*out of luck"):
                    session.ask(targets, 5).wait()
            with pytest.raises(ModelError, match=r"^tiny-2: .*out of luck"):
                next(session.read(0, ids, 3, 5))
            mend(actor)
            next(session.read(1, ids, 3, 5))
            faults += 4
            if number % 2:
                session.close()
            del session  # every other one without a close
        assert faults == 1000
        gc.collect()
        backend.open(1).close()
        assert sessions_of(there) == 0
        assert len(os.listdir("/proc/self/fd")) <= before + 5
        assert texts(there) == wanted

    def test_out_of_memory_is_that_here_too(self, there: Ensemble) -> None:
        """As the class that a server tells its clients of, and the ensemble goes on."""
        wanted = texts(there)
        fail(actor_of(there), MemoryError("no room"))
        with pytest.raises(OutOfMemory) as caught:
            texts(there)
        assert (caught.value.member, caught.value.what) == ("tiny-2", "MemoryError: no room")
        mend(actor_of(there))
        assert texts(there) == wanted

    def test_no_actor_left(self, one_byte_folders: list[Path]) -> None:
        """Neither after `close` nor when nothing holds the member."""
        before = actors_alive()
        closed, dropped = load_members(one_byte_folders, placement=SMALL)
        assert len(actors_alive() - before) == 2
        closed.backend.close()
        until(lambda: len(actors_alive() - before) == 1)
        with pytest.raises(MemberLost, match="tiny-1"):
            closed.backend.open()
        del dropped
        until(lambda: gc.collect() >= 0 and actors_alive() <= before)

    def test_a_model_that_cannot_be_loaded(self, one_byte_folders: list[Path], tmp_path: Path) -> None:
        """The error is the one of a member in process, and the actor goes."""
        before = actors_alive()
        broken = save_model(tmp_path / "broken", one_byte_tokens(), seed=3)
        (broken / "model.safetensors").write_bytes(b"nothing")
        errors = []
        for place in (None, SMALL):
            with pytest.raises(ModelError) as caught:
                load_member(broken, placement=place)
            errors.append((type(caught.value), str(caught.value)))
        assert errors[0] == errors[1]
        until(lambda: gc.collect() >= 0 and actors_alive() <= before)

    def test_another_tokenizer_there(
        self, one_byte_folders: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MemberActor, "vocabulary", lambda self: "another")
        ray.cloudpickle.register_pickle_by_value(sys.modules[MemberActor.__module__])
        try:
            with pytest.raises(ModelError, match="tokenizer read here is not that of the model in the actor"):
                load_member(one_byte_folders[0], placement=SMALL)
        finally:
            ray.cloudpickle.unregister_pickle_by_value(sys.modules[MemberActor.__module__])

    def test_every_reason_in_words(self) -> None:
        known = ray.exceptions
        for error, words in (
            (known.OutOfMemoryError("x"), "ran out of memory"),
            (known.ActorUnavailableError("x", None), "cannot be reached"),
            (known.NodeDiedError("x"), "machine is gone"),
            (known.WorkerCrashedError(), "WorkerCrashedError"),
            (known.RayTaskError("f", "trace", ValueError("bad\nluck")), "ValueError: bad"),
        ):
            assert words in actors.reason(error)


class TestPlacement:
    @pytest.mark.parametrize(
        ("placement", "message"),
        [
            ({"gpus": 1}, "placement has no 'gpus'; it has num_cpus, num_gpus, node"),
            ("node1", "placement is 'node1'; give a mapping"),
            ({"num_cpus": -1}, "num_cpus is -1; choose 0 or more"),
            ({"num_gpus": True}, "num_gpus is True"),
            ({"num_gpus": 1.5}, "num_gpus is 1.5; above 1 Ray takes whole numbers"),
            ({"node": ""}, "node is ''; give a text"),
            ({"bundle": 0}, "bundle is for placement_group"),
            ({"placement_group": 3}, "placement_group is 3; give the group"),
            ({"placement_group": "g", "node": "n"}, "node and placement_group exclude each other"),
            ({"address": "10.0.0.1:1"}, "this program is connected to Ray at"),
            ({"node": "10.9.9.9"}, r"the cluster has no node '10.9.9.9'; there are \d"),
            ({"placement_group": "nobody's"}, 'the cluster has no placement group "nobody\'s"'),
            (
                {"num_cpus": 5000},
                "num_cpus 5000 fits nowhere, not even when all is idle: .* has 4 CPU, 0 GPU",
            ),
            ({"num_gpus": 1}, "num_gpus 1 fits nowhere"),
        ],
    )
    def test_refused_early(self, one_byte_folders: list[Path], placement: Any, message: str) -> None:
        before = actors_alive()
        with pytest.raises(InputError, match=message):
            Ensemble.from_pretrained(one_byte_folders, placement=[None, placement])
        assert actors_alive() <= before

    def test_options_that_do_not_go_together(self, one_byte_folders: list[Path]) -> None:
        with pytest.raises(InputError, match="has no GPU, and the model is to use one; give num_gpus=1"):
            load_member(one_byte_folders[0], placement={}, device="cuda")
        with pytest.raises(InputError, match="timeout is for members that run elsewhere"):
            load_member(one_byte_folders[0], timeout=5)
        with pytest.raises(InputError, match="timeout is 0; choose seconds above 0"):
            load_member(one_byte_folders[0], placement={}, timeout=0)

    def test_no_room_at_the_moment(
        self, one_byte_folders: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error comes after the time limit and says what is left; nothing waits on."""
        monkeypatch.setattr(actors, "PLACING_SECONDS", 2.0)
        before = actors_alive()
        large = ray.remote(actors.Actor).options(num_cpus=3).remote()
        ray.get(large.version.remote())
        with pytest.raises(
            InputError, match=r"not started within 2 seconds: .*num_cpus 2.* 1 CPU, 0 GPU left"
        ):
            load_member(one_byte_folders[0], placement={"num_cpus": 2})
        ray.kill(large)
        until(lambda: actors_alive() <= before)

    def test_in_a_group_of_the_users(self, one_byte_folders: list[Path]) -> None:
        group = placement_group([{"CPU": 1}, {"CPU": 1}], name="ours")
        ray.get(group.ready())
        try:
            member = load_member(one_byte_folders[0], placement={"placement_group": "ours", "bundle": 1})
            actor = member.backend.actor  # type: ignore[attr-defined]
            inside = in_actor(actor, lambda _: ray.util.get_current_placement_group().id.hex())
            assert inside == group.id.hex()
            member.backend.close()
            for wrong, message in (({"bundle": 2}, "has 2 bundles"), ({"num_cpus": 2}, "bundle 0 has 1 CPU")):
                with pytest.raises(InputError, match=message):
                    load_member(one_byte_folders[0], placement={"placement_group": group, **wrong})
        finally:
            remove_placement_group(group)

    def test_on_a_node_with_threads(self, one_byte_folders: list[Path]) -> None:
        """Threads are the CPUs that were reserved, where the environment does not say otherwise."""
        (node,) = ray.nodes()
        member = load_member(
            one_byte_folders[0], placement={"node": node["NodeManagerAddress"], "num_cpus": 2}
        )
        actor = member.backend.actor  # type: ignore[attr-defined]
        assert in_actor(actor, lambda _: ray.get_runtime_context().get_node_id()) == node["NodeID"]
        threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
        assert in_actor(actor, lambda _: torch.get_num_threads()) == threads
        member.backend.close()

    def test_without_ray(self, one_byte_folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ModelError, match=r"not installed: pip install 'deepen-ext\[ray\]'"):
            load_member(one_byte_folders[0], placement={})


def test_ray_is_imported_when_a_member_asks_for_it() -> None:
    code = (
        "import sys, deepen_ext; deepen_ext.Ensemble, deepen_ext.Replicas, deepen_ext.evaluate; "
        "import deepen_ext.members.ray.load; print('ray' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
