"""The page of a check: one file, without network and scripts."""

from __future__ import annotations

import base64

from suite.check.result import Result, bar_rows, flight_lines, number_rows, ratio_rows
from suite.report.templating import render_page


def page(result: Result) -> bytes:
    return render_page(
        "suite.check", "check.html.j2", result=result, numbers=number_rows(result), ratios=ratio_rows(result), bars=bar_rows(result),
        flight=result.preflight, flight_text=flight_lines(result.preflight) if result.preflight else [],
        figure=base64.b64encode(result.figure).decode() if result.figure else "",
    ).encode()  # fmt: skip
