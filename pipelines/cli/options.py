"""How the command line reads options."""

from typing import Any, get_type_hints

from typer.core import TyperCommand

from curation.errors import ConfigError


class OneValueEach(TyperCommand):
    """A verb that loses no value: a text given twice for an option that takes one is refused.

    Of numbers and choices the last counts, so that a command can be repeated with another.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Look at the options before they are read.

        Raises:
            ConfigError: names the option.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        kinds = get_type_hints(self.callback)
        for option in order:
            takes_one = kinds.get(str(option.name)) in (str, str | None)
            if takes_one and order.count(option) > 1:
                raise ConfigError(
                    f"curate {ctx.info_name}: {option.opts[0]} is given {order.count(option)} "
                    "times and takes one value; give it once"
                )
        return super().parse_args(ctx, args)
