"""The pages of the lab, beside those of `curate serve`: the only thing written is an answer."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, RedirectResponse

from pipelines.web import charts
from pipelines.web.calibration.curves import by_bin
from pipelines.web.calibration.lab import Lab
from pipelines.web.calibration.questions import Kind
from pipelines.web.galleries import Group, veil_together
from pipelines.web.serving.api import Problem
from pipelines.web.serving.site import Served

_ASKED = {
    Kind.dedup: "Do both show the same picture, edited or not?",
    Kind.leaks: "Is the left picture a copy of the benchmark's, edited or not?",
    Kind.nsfw: "Should this picture be kept out?",
}
_ANSWERS = {"yes": True, "no": False, "unsure": None}


class _NextQuestion(RedirectResponse):
    """Leads to a page, as its problems are pages: so the OpenAPI says."""

    media_type = "text/html"


router = APIRouter()


def add_lab(app: FastAPI, lab: Lab) -> None:
    """Add the lab to a server."""
    app.state.lab = lab
    app.include_router(router)


def _lab_of(request: Request) -> Lab:
    lab: Lab = request.app.state.lab
    return lab


_Lab = Annotated[Lab, Depends(_lab_of)]


@router.get("/calibrate", response_class=HTMLResponse)
def calibrate(
    site: Served, lab: _Lab, ask: Annotated[int | None, Query(ge=0, le=10**9)] = None
) -> str:
    """A question, and what follows from the answers so far."""
    answers, sample = lab.ratings.read(), lab.sample
    number = ask if ask is not None and ask < len(lab.questions) else lab.next(answers)
    album, group = site.album(), None
    if number is not None:
        question = lab.questions[number]
        items = [album.find(question.flow, question.id)]
        if question.twin:
            items.append(album.find(question.twin_flow or question.flow, question.twin))
        for item in items:
            item.facts.clear()
        group = Group(items, kind="pair")
        veil_together([group], album)
    points = lab.points(answers)
    bands = [
        charts.Series(
            name,
            [(point.threshold, getattr(point, name)) for point in points],
            [(getattr(p, f"{name}_low"), getattr(p, f"{name}_high")) for p in points],
        )
        for name in ("precision", "recall")
    ]
    own = [] if sample.threshold is None else [sample.threshold]
    return site.render(
        "calibrate",
        kind=str(sample.kind),
        question=_ASKED[sample.kind],
        number=number,
        last=number - 1 if number else None,
        group=group,
        album=album,
        asked=len(lab.questions),
        answered=sum(one.key in answers for one in lab.questions),
        path=lab.ratings.path,
        points=points,
        threshold=sample.threshold,
        chart=charts.band_chart(bands, own, "threshold") if points else None,
        bins=by_bin(sample, answers),
    )


@router.post(
    "/calibrate/{number}/{answer}",
    response_class=_NextQuestion,
    status_code=303,
    responses={code: {"model": Problem} for code in (403, 404)},
)
def answered(
    request: Request,
    lab: _Lab,
    number: Annotated[int, PathParameter(ge=0, le=10**9)],
    answer: Literal["yes", "no", "unsure"],
) -> _NextQuestion:
    """Write an answer down; the next question follows."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        # a form elsewhere must not write any
        raise HTTPException(403, "answers are taken from this server's own pages only")
    if number >= len(lab.questions):
        raise HTTPException(404, f"there is no question {number}")
    lab.ratings.add(str(lab.sample.kind), lab.questions[number], _ANSWERS[answer])
    return _NextQuestion("/calibrate", 303)
