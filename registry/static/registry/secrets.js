// Keeps the table of a key's secrets up to date while somebody looks: who still uses the old one?
const SECONDS = 5;

async function refresh(table) {
  if (document.hidden) return;
  const answer = await fetch(table.dataset.source, { credentials: "same-origin", redirect: "error" });
  if (!answer.ok) return;
  const read = new DOMParser().parseFromString(`<table><tbody>${await answer.text()}</tbody></table>`, "text/html");
  table.tBodies[0].replaceWith(document.adoptNode(read.querySelector("tbody")));
}

function start() {
  for (const table of document.querySelectorAll("table.secrets")) {
    // What cannot be asked now is asked again: the server may be starting.
    setInterval(() => refresh(table).catch(() => {}), SECONDS * 1000);
  }
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
