"""All ways to set a configuration key, and all messages about wrong values."""

import contextlib
import dataclasses
import errno
import io
import itertools
import os
import re
import subprocess
import sys
from unittest.mock import Mock

import hypothesis
import pytest
import yaml
from conftest import ROOT, TINY, tiny_keys
from hypothesis import strategies as st

import analysis
import config as configuration
import data
import eval
import record
import train
from config import Config, ConfigError
from training import loading, stages
from training.models import make_model
from training.step import make_state

CONFIGS = sorted(str(path.relative_to(ROOT / "configs"))[:-4] for path in (ROOT / "configs").glob("**/*.yml"))
CONFIGS = [name for name in CONFIGS if not name.startswith("sweeps/")]
GROUPS = list(configuration.groups())


def test_flags_override_yaml_which_overrides_defaults(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("lr: 1e-4\nbatch_size: 7\n")
    c = configuration.parse(["--config", str(file), "--batch_size", "9"])
    assert (c.lr, c.batch_size, c.levels) == (1e-4, 9, 3)


def test_keys_are_checked_after_all_sources_are_merged(tmp_path):
    """A value of a file that is wrong with the defaults can be right with the flags."""
    file = tmp_path / "a.yml"
    file.write_text("levels: 4")
    assert configuration.parse(["--config", str(file), "--open_loop_ctx", "216"]).open_loop_ctx == 216


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--lr", "1e-4"], "lr", 1e-4),
        (["--lr=5"], "lr", 5.0),
        (["--save_gifs=False"], "save_gifs", False),
        (["--save_gifs", "false"], "save_gifs", False),
        (["--cell_mean_only"], "cell_mean_only", True),
        (["--no-save-grid"], "no_save_grid", True),
        (["--use_obs", "TTF"], "use_obs", "TTF"),
        (["--use-obs=TFF"], "use_obs", "TFF"),
        (["--use_obs", "ttf"], "use_obs", "TTF"),
        (["--use_obs", "null"], "use_obs", None),
        (["--beta", "0.5"], "beta", 0.5),
        (["--beta", "[1,0.5,1e-1]"], "beta", (1.0, 0.5, 0.1)),
        (["--beta", "null"], "beta", None),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--clip_grad_norm_by", "0"], "clip_grad_norm_by", 0.0),
        (["--seed", "4294967295"], "seed", 2**32 - 1),
        (["--max_steps", "12345678901234567"], "max_steps", 12345678901234567),
        (["--logdir", "1e5"], "logdir", "1e5"),
        (["--name", "1e5"], "name", "1e5"),
        (["--name", "null"], "name", None),
        (["--name", "größer_lr0.001"], "name", "größer_lr0.001"),
        (["--datadir", "a-b/c_d"], "datadir", "a-b/c_d"),
    ],
)
def test_flags_set_keys(arguments, key, value):
    got = getattr(configuration.parse(["--dataset=mmnist", *arguments]), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--leyels", "3"], "command line: unknown argument '--leyels'; did you mean '--levels'?"),
        (["--lr", "fast"], "command line: lr: needs a number, got 'fast'"),
        (["--lr", ".nan"], "command line: lr: needs a number, got nan"),
        (["--lr"], "command line: argument --lr: expected one argument"),
        (["--levels", "2.5"], "command line: levels: needs a whole number, got 2.5"),
        (["--levels", "null"], "command line: levels: needs a whole number, got null"),
        (["--save_gifs", "maybe"], "command line: save_gifs: needs true or false, got 'maybe'"),
        (["--beta", "[1,x]"], "command line: beta: needs a number or a list of numbers or null, got [1, 'x']"),
        (["--levels", "0"], "levels: must be at least 1, got 0"),
        (["--lr", "0"], "lr: must be above 0, got 0.0"),
        (["--seed", "4294967296"], "seed: must be at most 4294967295, got 4294967296"),
        (["--batch_size", "-1"], "batch_size: must be at least 1, got -1"),
        (["--seq_len", "0"], "seq_len: must be at least 1, got 0"),
        (["--beta", "[1,-1,1]"], "beta: must be at least 0, got (1.0, -1.0, 1.0)"),
        (["--beta", "[1,2]"], "beta: needs one number, or one for each of the 3 levels, got [1.0, 2.0]"),
        (["--use_obs", "TT"], "use_obs: needs one T or F for each of the 3 levels, got 'TT'"),
        (["--use_obs", "TTX"], "use_obs: needs one T or F for each of the 3 levels, got 'TTX'"),
        (["--kl_grad_post_perc", "1.1"], "kl_grad_post_perc: must be a share between 0 and 1, got 1.1"),
        (["--cell_type", "LSTM"], "cell_type: must be one of RSSMCell, got 'LSTM'"),
        (
            ["--dataset", "mazed"],
            f"dataset: must be one of {', '.join(configuration.CHANNELS)}, got 'mazed'; did you mean 'mazes'?",
        ),
        *(
            (
                [f"--name={name}"],
                f"name: may have letters, digits and _ . + - only, must begin with a letter, a digit or _, and can't be latest; got {name!r}",
            )
            for name in ("latest", "a/b", "..", ".hidden", "-x", "two words", "a\n")
        ),
        (["--dataset", "minerl"], "channels: minerl has 3, got 1; set --channels 3"),
        (["--dataset", "videos", "--channels", "2"], "channels: videos has 1 or 3, got 2; set --channels 1 or 3"),
        (["--digit_speed", "[6,2]"], "digit_speed: needs the slowest and the fastest speed, got [6.0, 2.0]"),
        (["--digit_speed", "3"], "command line: digit_speed: needs a list of numbers, got 3"),
        (
            ["--wandb", "ofline"],
            "wandb: must be one of auto, online, offline, disabled, got 'ofline'; did you mean 'offline'?",
        ),
        (
            ["--open_loop_ctx", "50"],
            "open_loop_ctx: must be a multiple of tmp_abs_factor**(levels-1) = 36, the frames of one tick of the top level, "
            "got 50; the nearest is 36",
        ),
        (
            ["--eval_seq_len", "36"],
            "open_loop_ctx: must be less than eval_seq_len = 36, so that frames are left to predict, got 36",
        ),
        (
            ["--config", "debug"],
            f"debug: no such file; name a YAML file such as {os.path.relpath(ROOT / 'configs' / 'debug.yml')}; "
            f"there are {', '.join(CONFIGS)}",
        ),
        (
            ["--config", "mnist.yml"],
            f"mnist.yml: no such file; name a YAML file such as {os.path.relpath(ROOT / 'configs' / 'mmnist.yml')}; "
            f"there are {', '.join(CONFIGS)}",
        ),
        (["--config", str(ROOT)], f"{ROOT}: can't be read (Is a directory); name a YAML file"),
    ],
)
def test_wrong_flags_are_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        configuration.parse(arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("levles: 3", "unknown key 'levles'; did you mean 'levels'?"),
        ("qqqq: 3", "unknown key 'qqqq'"),
        ("lr: fast", "lr: needs a number, got 'fast'"),
        ("lr: [", "not valid YAML"),
        ("[" * 3000, "not valid YAML (maximum recursion depth exceeded"),
        ("- lr", "must hold `key: value` lines, got list"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_wrong_configuration_files_are_named(tmp_path, text, message):
    file = tmp_path / "a.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        configuration.parse(["--config", str(file)])
    assert str(error.value).startswith(f"{file}: {message}") and "\n" not in str(error.value)


NOTHING_NAMED = (
    "dataset: none is named, and the default, mmnist, is a large download (8.2 GB decoded); call PROGRAM --config "
    "configs/mmnist.yml for it, or PROGRAM --config configs/debug.yml for digits that need no download"
)


def test_a_dataset_must_be_named(tmp_path, monkeypatch):
    file = tmp_path / "a.yml"
    file.write_text("levels: 2")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    for parse, program in (
        (lambda argv: configuration.parse(argv), "train.py"),
        (lambda argv: configuration.parse(argv, "data.py", ""), "data.py"),
        (lambda argv: next(stages.configurations(argv)), "python -m training.stages"),
    ):
        for argv in [], ["--lr=1e-3"]:
            with pytest.raises(ConfigError) as error:
                parse(argv)
            assert str(error.value) == NOTHING_NAMED.replace("PROGRAM", program)
        for argv in ["--dataset=mmnist"], ["--config", str(file)]:
            assert parse(argv).dataset == "mmnist"
        with monkeypatch.context() as sweep:
            sweep.setenv("WANDB_SWEEP_ID", "abc")
            assert parse([]).dataset == "mmnist"


def test_any_context_is_accepted_for_whole_videos():
    assert Config(eval_seq_len=0).eval_seq_len == 0


def test_programs_refuse_wrong_flags_in_one_line_with_code_2():
    for program in "train.py", "eval.py":
        done = subprocess.run([sys.executable, ROOT / program, "--levels", "none"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def help_of(main, *command):
    """Return what `--help` prints, without wrapped lines."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "1000")
        patch.setattr(sys, "argv", ["program.py", *command, "--help"])
        with contextlib.suppress(SystemExit):
            main()
    return printed.getvalue()


@pytest.mark.parametrize(
    "main, own, groups",
    [
        (train.main, ["config", "grid"], GROUPS),
        (stages.main, ["config", "scale"], GROUPS),
        (data.main, ["config"], GROUPS),
        (
            eval.main,
            ["logdir", "out", "format", "videos", "lpips", "fvd"],
            ["EVALUATION", *(group for group in GROUPS if group != "EVALUATION")],
        ),
        (record.main, ["env", "episodes", "test_episodes", "datadir", "steps", "policy", "seed", "processes"], []),
    ],
)
def test_help_lists_flags_keys_and_examples(main, own, groups):
    """It has one line of usage, the program's own flags, all keys in groups with types and choices, and examples."""
    text = help_of(main)
    usage, _, *sections, examples = text.rstrip().split("\n\n")
    assert usage.startswith("usage: python ") and "\n" not in usage
    assert examples.startswith("examples:\n  python ") and "VALUE" not in text
    assert re.findall(r"^  --(\w+)", sections[0], re.MULTILINE) == own
    assert [section.split(":\n")[0] for section in sections[2:]] == groups
    if groups:
        keys = re.findall(r"^  --(\w+)", "\n".join(sections[2:]), re.MULTILINE)
        assert sorted(keys) == sorted(set(vars(Config())) - set(own))
        default = "" if main is eval.main else " (default: 6)"
        line = f"  --tmp_abs_factor INT +temporal abstraction factor k: level l ticks every k\\^l frames{re.escape(default)}\n"
        assert re.search(line, text)
        for shown in (
            "--fit {crop,pad,stretch} ",
            "--beta NUMBER|LIST ",
            "--cell_mean_only [{true,false}]\n",
            "--lr NUMBER ",
        ):
            assert f"  {shown}" in text


@pytest.mark.parametrize("command", analysis.COMMANDS)
def test_help_of_an_analysis_has_usage_and_examples(command):
    text = help_of(analysis.main, command)
    assert text.startswith(f"usage: python analysis.py {command} ")
    assert f"\n\nexamples:\n  python analysis.py {command} " in text and "VALUE" not in text
    assert ("  --lr NUMBER " in text) == (command not in ["perceptual", "compare", "ranks", "seeds", "curves"])
    assert command in help_of(analysis.main)


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configurations_load_and_have_a_header(name):
    path = ROOT / "configs" / f"{name}.yml"
    c = configuration.load(path)
    last = name.split("/")[-1]
    if last != "debug":
        others = {"small": "digits", "long": "digits", "dot": "episodes", "memory_maze": "episodes"}
        assert c.dataset == others.get(last, last)
    if "/" in name:
        assert c.model == name.split("/")[0]
    elif name not in ("debug", "dot", "memory_maze"):
        assert (c.levels, c.tmp_abs_factor, c.seq_len) == (3, 6, 100)
    if name not in ("debug", "dot", "small", "long", "memory_maze") and c.model == "cwvae":
        assert (c.batch_size, c.enc_dense_layers) == (50, 3)
    header = path.read_text().split("\n\n")[0]
    program = "python -m training.stages" if name in ("long", "memory_maze") else "train.py"
    assert f"{program} --config configs/{name}.yml" in header and "Runtime" in header and "Score" in header


# All values of a field's type. Combinations may be wrong.
VALUES = {
    int: st.integers(1, 10**18),
    float: st.floats(1e-30, 1e30),
    bool: st.booleans(),
    str: st.text(min_size=1).filter(lambda s: s.strip().lower() not in ("null", "none", "~", "")),
    type(None): st.none(),
}


@hypothesis.given(st.data())
@hypothesis.settings(deadline=None, max_examples=200)
def test_a_configuration_survives_yaml(tmp_path_factory, data):
    keys = [
        f
        for f in dataclasses.fields(Config)
        if "cwvae" in (f.metadata["models"] or ["cwvae"])
        and not f.metadata["choices"]
        and f.name
        not in (
            "name",
            "levels",
            "tmp_abs_factor",
            "channels",
            "open_loop_ctx",
            "eval_seq_len",
            "digit_speed",
        )
    ]
    values = {}
    for field in data.draw(st.lists(st.sampled_from(keys), unique_by=lambda f: f.name)):
        kinds = [k for k in VALUES if k == field.type or k in getattr(field.type, "__args__", ())]
        values[field.name] = data.draw(st.one_of(*(VALUES[k] for k in kinds)))
    if "use_obs" in values:
        values["use_obs"] = data.draw(st.none() | st.text("TF", min_size=3, max_size=3))
    if values.get("kl_grad_post_perc"):
        values["kl_grad_post_perc"] = data.draw(st.floats(0, 1))
    if values.get("split"):
        values["split"] = data.draw(st.floats(1e-9, 1, exclude_max=True))
    if values.get("seed"):
        values["seed"] %= 2**32
    if "beta" in values:
        values["beta"] = data.draw(st.none() | st.floats(0, 1e9) | st.tuples(*[st.floats(0, 1e9)] * 3))
    c = Config(**values)
    path = tmp_path_factory.mktemp("config") / "config.yml"
    path.write_text(c.to_yaml())
    again = configuration.load(path)
    assert again == c
    assert yaml.safe_load(path.read_text()).keys() == dataclasses.asdict(c).keys()
    path.with_name("again.yml").write_text(again.to_yaml())
    assert path.read_text() == path.with_name("again.yml").read_text()


def test_keys_that_a_model_does_not_read_are_refused():
    assert Config(model="svg", svg_network="vgg", open_loop_ctx=7).block == 1
    # SVG's training depends on it.
    assert "open_loop_ctx" in Config().free and "open_loop_ctx" not in Config(model="svg").free
    with pytest.raises(ConfigError, match=r"levels: svg doesn't read it \(it is for cwvae\), got 2; leave it out"):
        Config(model="svg", levels=2)
    with pytest.raises(ConfigError, match=r"svg_network: cwvae doesn't read it \(it is for svg\), got 'vgg'"):
        Config(svg_network="vgg")


def test_run_names_follow_from_the_keys():
    c = configuration.load(ROOT / "configs" / "minerl.yml")
    base = "minerl_cwvae_rssmcell_3l_f6_decsd0.4_enchl3_ences1000_edchnlmult1_ss100_ds800_es800_seq100_lr0.0001_bs50"
    assert c.run_name == base
    assert dataclasses.replace(c, beta=[1, 2, 3], seed=4).run_name == base + "_beta1.0-2.0-3.0_seed4"
    assert dataclasses.replace(c, num_epochs=1, wandb="offline").run_name == base
    assert dataclasses.replace(c, name="first", seed=4).run_name == "first"


def test_a_config_is_checked_however_it_is_made():
    with pytest.raises(ConfigError):
        dataclasses.replace(Config(), levels=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().levels = 2  # type: ignore[misc]
    assert Config(**TINY).updated({"lr": "1e-2"}, "wandb").lr == 0.01
    with pytest.raises(ConfigError, match="wandb: unknown key 'learning_rate'"):
        Config().updated({"learning_rate": 1}, "wandb")


KEYS = [field.name for field in dataclasses.fields(Config)]
ANYTHING = st.one_of(
    st.text(max_size=8),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "-1", "0", "1e-4", "1e400", "nan", "[1, 2]", "[]", "{}", "[[1]]", "null", "true", "TTF", "'", "{a: *b}"]
    ),
)
FLAG = st.one_of(st.sampled_from(KEYS), st.text(max_size=5)).flatmap(
    lambda key: st.one_of(
        ANYTHING.map(lambda value: [f"--{key}={value}"]), ANYTHING.map(lambda value: [f"--{key}", value])
    )
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Replace the work of the programs by mocks, so that only their command lines are read. Return a directory."""
    directory = tmp_path_factory.mktemp("fuzz")
    run = directory / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (run / "config.yml").write_text(Config().to_yaml())
    with pytest.MonkeyPatch.context() as patch:
        for program, work in (train, "train"), (eval, "evaluate"), (data, "inspect_dataset"):
            patch.setattr(program, work, lambda *_: Mock(step=1))
        yield directory


def run_program(main, arguments):
    """Return a program's exit code and standard error."""
    error = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(error),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        patch.setattr(sys, "argv", ["program.py", *arguments])
        try:
            main()
        except SystemExit as exit:
            return exit.code, error.getvalue()
    return 0, error.getvalue()


def assert_accepted_or_refused_in_one_line(main, arguments):
    code, error = run_program(main, arguments)
    if code == 0:
        assert error == ""
    else:
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (arguments, code, error)


@hypothesis.given(st.lists(FLAG, max_size=4).map(lambda flags: list(itertools.chain(*flags))))
@hypothesis.settings(deadline=None, max_examples=300, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_command_line_works_or_is_refused_in_one_line(programs, flags):
    assert_accepted_or_refused_in_one_line(train.main, ["--dataset=mmnist", *flags])
    assert_accepted_or_refused_in_one_line(data.main, ["--dataset=mmnist", *flags])
    assert_accepted_or_refused_in_one_line(eval.main, ["--logdir", str(programs / "run"), *flags])


def test_paths_that_cannot_be_read_are_refused_in_one_line(programs, monkeypatch):
    """For example, names that are too long."""
    long = str(programs / ("a" * 300))
    for main, arguments in (
        (train.main, ["--config", long]),
        (data.main, ["--config", long]),
        (eval.main, ["--logdir", long]),
        (analysis.main, ["levels", long]),
    ):
        code, error = run_program(main, arguments)
        assert code == 2 and error == (
            f"error: {long} can't be read or written (File name too long); make room or permit it there, or name "
            "another path\n"
        )
    monkeypatch.setattr(train, "train", Mock(side_effect=OSError(errno.EDQUOT, "Disk quota exceeded")))
    code, error = run_program(train.main, ["--dataset=mmnist"])
    assert code == 2 and error.startswith("error: a file can't be read or written (Disk quota exceeded); ")


VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.dates()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
YAML = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4), st.integers()), VALUE, max_size=4).map(
        lambda values: yaml.safe_dump(values).encode()
    ),
    st.text(max_size=40).map(str.encode),
    st.binary(max_size=40),
)


@hypothesis.given(YAML)
@hypothesis.settings(deadline=None, max_examples=300, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_file_works_or_is_refused_in_one_line(programs, content):
    file = programs / "config.yml"
    file.write_bytes(content)
    assert_accepted_or_refused_in_one_line(train.main, ["--config", str(file)])
    (programs / "run" / "config.yml").write_bytes(content)
    try:
        assert_accepted_or_refused_in_one_line(eval.main, ["--logdir", str(programs / "run")])
    finally:
        (programs / "run" / "config.yml").write_text(Config().to_yaml())


def test_a_configuration_of_another_model_is_refused():
    for path, model, remedy in (
        (ROOT / "configs" / "small.yml", "svg", f"name {ROOT / 'configs' / 'svg' / 'small.yml'}"),
        (ROOT / "configs" / "svg" / "small.yml", "cwvae", f"name {ROOT / 'configs' / 'small.yml'}"),
        (ROOT / "configs" / "debug.yml", "vta", "name a configuration of vta"),
    ):
        own = configuration.load(path).model
        with pytest.raises(ConfigError, match=re.escape(f"model: {path} is for {own} (")) as error:
            configuration.parse([f"--config={path}", f"--model={model}"])
        assert f"got {model}; {remedy}, or leave --model out" in str(error.value)
        assert configuration.parse([f"--config={path}", f"--model={own}"]).model == own


def test_keys_that_change_the_parameters_shapes_are_declared():
    """Changing a key changes the shapes exactly if the key is declared to do so."""
    fields = list(vars(Config()))
    own = set(fields[: fields.index("dataset")]) - {"model", "cell_type"}
    for model in configuration.MODELS:
        keys = {key: value for key, value in tiny_keys(model).items() if key not in ("open_loop_ctx", "eval_seq_len")}
        c = Config(**keys | dict(model=model, seq_len=40, open_loop_ctx=72))
        before = shapes_of(c)
        for key in own & configuration.read_by(model):
            value = getattr(c, key)
            if isinstance(value, str):
                (field,) = (field for field in dataclasses.fields(c) if field.name == key)
                other = next(choice for choice in field.metadata["choices"] if choice != value)
            else:
                other = not value if isinstance(value, bool) else (value or 2) + 1
            changed = shapes_of(dataclasses.replace(c, **{key: other}))
            assert (changed != before) == (key in configuration.marked("shapes")), (model, key)


def shapes_of(c):
    return loading.shapes(make_state(make_model(c)).params)


@pytest.mark.parametrize("flag", ["--name=", "--logdir=", "--config="])
def test_an_empty_value_is_refused(flag):
    """For example, "$NAME" is empty if the shell has no such variable."""
    key = flag.strip("-=")
    with pytest.raises(ConfigError, match=f"^{key}: the value is empty; give one, or leave --{key} out$"):
        configuration.parse(["--dataset=digits", flag])
