def page(steps): return ""
