"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* a file has no storage */ }
  });
  try {
    const before = localStorage.getItem("theme");
    if (before) root.dataset.theme = before;
  } catch { /* nothing to remember */ }

  // one image at a time, with all that is known of it
  const viewer = document.getElementById("viewer");
  let current = null;
  const shown = () => all(".look").filter((one) => one.offsetParent && !one.classList.contains("veiled"));
  const pair = (list, name, value) => {
    if (value === undefined || value === null || value === "") return;
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name.replaceAll("_", " ");
    text.textContent = value;
    list.append(term, text);
  };
  const open = (button) => {
    current = button;
    const { id, flow, source, size, role, facts, full, page } = button.dataset;
    viewer.querySelector("h3").textContent = role || "Image";
    const image = viewer.querySelector("img");
    image.src = full || button.querySelector("img").src;
    image.alt = `Image ${id}`;
    const list = viewer.querySelector("dl");
    list.replaceChildren();
    pair(list, "id", id);
    pair(list, "flow", flow);
    pair(list, "source", source);
    pair(list, "stored size", size);
    for (const [name, value] of Object.entries(JSON.parse(facts || "{}"))) pair(list, name, value);
    const life = viewer.querySelector(".life");
    life.hidden = !page;
    life.replaceChildren();
    if (page) {
      const link = document.createElement("a");
      link.href = page;
      link.textContent = "Its whole life";
      life.append(link);
    }
    if (!viewer.open) viewer.showModal();
  };
  const move = (step) => {
    const buttons = shown();
    const next = buttons[buttons.indexOf(current) + step];
    if (next) open(next);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".look");
    if (!button) return;
    if (button.classList.contains("veiled")) {
      button.classList.remove("veiled");
      if (button.dataset.full) button.querySelector("img").src = button.dataset.full;
      button.setAttribute("aria-label", `Image ${button.dataset.id.slice(0, 8)}: details`);
      return;
    }
    open(button);
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") move(1);
    if (event.key === "ArrowLeft") move(-1);
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => { if (current) current.focus(); });

  // arrows walk through a row of images
  document.addEventListener("keydown", (event) => {
    const here = document.activeElement;
    if (viewer.open || !here || !here.classList.contains("look")) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const buttons = all(".look").filter((one) => one.offsetParent);
    const next = buttons[buttons.indexOf(here) + step];
    if (next) { next.focus(); event.preventDefault(); }
  });

  // search and filter
  const search = document.getElementById("search");
  const part = document.getElementById("part");
  const found = document.getElementById("found");
  const filter = () => {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const section of all("section.galleries")) {
      const here = !part.value || section.id === part.value;
      section.hidden = !here;
      for (const gallery of all(".gallery", section)) {
        const title = gallery.querySelector(".name").textContent.toLowerCase();
        let left = 0;
        for (const group of all(".group", gallery)) {
          const texts = all(".shot", group).map((one) => `${one.dataset.text} ${title}`.toLowerCase());
          const hit = words.every((word) => texts.some((text) => text.includes(word)));
          group.hidden = !hit;
          if (hit) left += texts.length;
        }
        gallery.hidden = words.length > 0 && left === 0;
        if (words.length && left) gallery.open = true;
        if (here) count += left;
      }
    }
    found.value = words.length || part.value ? `${count} images` : "";
  };
  if (search) {
    search.addEventListener("input", filter);
    part.addEventListener("change", filter);
    document.addEventListener("keydown", (event) => {
      if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName) && !viewer.open) {
        search.focus();
        event.preventDefault();
      }
    });
  }

  // pictures of the map
  const hover = document.getElementById("hover");
  if (hover) {
    const pictures = new Map(all("#map-pictures img").map((one) => [one.dataset.id, one.src]));
    const card = hover.parentElement;
    const show = (event) => {
      const dot = event.target.closest(".map .dot");
      const source = dot && pictures.get(dot.dataset.id);
      hover.style.display = source ? "block" : "none";
      if (!source) return;
      hover.firstElementChild.src = source;
      const box = card.getBoundingClientRect();
      const at = dot.getBoundingClientRect();
      hover.style.left = `${Math.max(0, Math.min(at.left - box.left + 14, box.width - 150))}px`;
      hover.style.top = `${at.top - box.top + 14}px`;
    };
    card.addEventListener("pointermove", show);
    card.addEventListener("pointerdown", show);
    card.addEventListener("pointerleave", () => { hover.style.display = "none"; });
  }

  // where the reader is
  const links = new Map(all('nav a[href^="#"]').map((one) => [one.getAttribute("href").slice(1), one]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of all("main section")) watch.observe(section);
})();
