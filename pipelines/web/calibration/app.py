"""The pages of the lab, beside those of `curate serve`: the only thing written is an answer."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, RedirectResponse

from pipelines.web.calibration.curves import by_bin
from pipelines.web.calibration.lab import Lab
from pipelines.web.calibration.questions import Kind
from pipelines.web.report import charts
from pipelines.web.report.galleries import Group, veil_together
from pipelines.web.serving.app import Problem
from pipelines.web.serving.pages import Pages

_ASKED = {
    Kind.dedup: "Do both show the same picture, edited or not?",
    Kind.leaks: "Is the left picture a copy of the benchmark's, edited or not?",
    Kind.nsfw: "Should this picture be kept out?",
}
_ANSWERS = {"yes": True, "no": False, "unsure": None}


class _NextQuestion(RedirectResponse):
    """Leads to a page, as its problems are pages: so the OpenAPI says."""

    media_type = "text/html"


def add_lab(app: FastAPI, lab: Lab) -> None:
    """Add the lab to a server."""
    pages: Pages = app.state.audit.pages

    @app.get("/calibrate", response_class=HTMLResponse)
    def calibrate(ask: Annotated[int | None, Query(ge=0, le=10**9)] = None) -> str:
        """A question, and what follows from the answers so far."""
        return lab_page(pages, lab, ask)

    @app.post(
        "/calibrate/{number}/{answer}",
        response_class=_NextQuestion,
        status_code=303,
        responses={code: {"model": Problem} for code in (403, 404)},
    )
    def answered(
        request: Request,
        number: Annotated[int, PathParameter(ge=0, le=10**9)],
        answer: Literal["yes", "no", "unsure"],
    ) -> _NextQuestion:
        """Write an answer down; the next question follows."""
        _refuse_foreign(request)
        if number >= len(lab.questions):
            raise HTTPException(404, f"there is no question {number}")
        lab.judgements.add(str(lab.kind), lab.questions[number], _ANSWERS[answer])
        return _NextQuestion("/calibrate", 303)


def lab_page(pages: Pages, lab: Lab, ask: int | None) -> str:
    """The page as text. ask: number of a question to ask again."""
    answers = lab.judgements.read()
    number = ask if ask is not None and ask < len(lab.questions) else lab.next(answers)
    album, group = pages.album(), None
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
        charts.Band(
            "precision",
            [(p.threshold, p.precision, p.precision_low, p.precision_high) for p in points],
        ),
        charts.Band(
            "recall", [(p.threshold, p.recall, p.recall_low, p.recall_high) for p in points]
        ),
    ]
    own = lab.sample.threshold
    return pages.render(
        "calibrate",
        kind=str(lab.kind),
        question=_ASKED[lab.kind],
        number=number,
        last=number - 1 if number else None,
        group=group,
        album=album,
        asked=len(lab.questions),
        answered=sum(one.key in answers for one in lab.questions),
        path=lab.judgements.path,
        points=points,
        threshold=own,
        chart=charts.band_chart(bands, [own] if own is not None else [], "threshold")
        if points
        else None,
        bins=by_bin(lab.sample, answers),
    )


def _refuse_foreign(request: Request) -> None:
    """Answers come from our own pages: a form elsewhere must not write any."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "answers are taken from this server's own pages only")
