// What the theme leaves out for readers who use a keyboard or a screen reader.
addEventListener("DOMContentLoaded", () => {
  for (const caption of document.querySelectorAll("p.caption[role=heading]")) caption.setAttribute("aria-level", "2");
  for (const wide of document.querySelectorAll("pre, .table-wrapper")) wide.tabIndex = 0;
  const sides = { ".sidebar-drawer": "All lessons", ".toc-drawer": "On this page" };
  for (const [side, name] of Object.entries(sides)) document.querySelector(side)?.setAttribute("aria-label", name);
  const results = document.querySelector("#search-results");
  results?.insertAdjacentHTML("beforebegin", "<h1>Search</h1>");
});
