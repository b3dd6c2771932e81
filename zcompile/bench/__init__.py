"""`zcompile bench`: training systems side by side, on the user's own processes or over a network shaped on one machine."""
