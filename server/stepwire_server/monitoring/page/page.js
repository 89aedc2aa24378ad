"use strict";
// Shows what the server streams. Everything from the server is set as text, never as HTML.
const find = (selector) => document.querySelector(selector);
const COLUMNS = [
  ["session", (s) => s.label || s.id.slice(0, 8)],
  ["state", (s) => s.state],
  ["step", (s) => String(s.step)],
  ["step/s", (s) => number(s.rate)],
  ["grad norm", (s) => (s.bad ? "NaN or Inf" : number(s.norm))],
  ["update/param", (s) => number(s.ratio), "wide"],
  ["lr", (s) => [...new Set(s.lr.map(number))].join(", "), "wide"],
  ["loss scale", (s) => number(s.scale), "wide"],
  ["lag", (s) => (s.lag === null ? "" : String(s.lag)), "wide"],
  ["memory", (s) => size(s.memory)],
  ["workers", (s) => `${s.attached}/${s.workers}`],
  ["via", (s) => s.via.join(", "), "wide"],
];
let chosen = "";
let latest = null;
let source = null;

function number(value) {
  if (value === null || value === undefined) return "";
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3)) return value.toExponential(2);
  return String(+value.toPrecision(4));
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  for (; bytes >= 1024 && power < units.length - 1; power += 1) bytes /= 1024;
  return `${+bytes.toPrecision(3)} ${units[power]}`;
}

function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleString();

function element(name, text, ...classes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  made.classList.add(...classes);
  return made;
}

function tile(title, text, meter) {
  const made = element("dl", undefined, "tile");
  made.append(element("dt", title), element("dd", text));
  if (meter) {
    const bar = element("meter");
    Object.assign(bar, { min: 0, max: 1, high: 0.9, optimum: 0, value: meter.value });
    bar.setAttribute("aria-label", title);
    made.lastChild.append(bar);
  }
  return made;
}

function showServer(server) {
  const parked = server.parked ? `, ${server.parked} parked` : "";
  find("#server").replaceChildren(
    tile("up for", duration(server.uptime)),
    tile("sessions", `${server.sessions}${parked}`),
    tile("streams", String(server.streams)),
    tile("steps per second", number(server.rate)),
    tile("not yet durable", `${server.lag} steps`),
    ...server.memory.map(({ device, reserved, budget }) =>
      tile(`memory of ${device}`, `${size(reserved)} of ${size(budget)}`, { value: budget ? reserved / budget : 0 })),
  );
}

function describe(trouble) {
  const steps = trouble.steps > 1 ? `${trouble.steps} steps, ${trouble.first_step} to ${trouble.last_step}` : `step ${trouble.first_step}`;
  const groups = trouble.groups.length ? `, group ${trouble.groups.join(", ")}` : "";
  const what = trouble.kind === "nan" ? "NaN or Inf in the gradient" : `gradient norm ${number(trouble.norm)}, far above the usual`;
  return `${what}: ${steps}${groups}, worker ${trouble.workers.join(", ")}, since ${clock(trouble.at)}`;
}

function showTroubles(sessions) {
  const found = sessions.flatMap((session) => session.troubles.map((trouble) => ({ session, trouble })));
  found.sort((a, b) => b.trouble.at - a.trouble.at);
  find("#troubles").hidden = !found.length;
  keepFocus(find("#troubles ul"), found.slice(0, 10).map(({ session, trouble }) => {
    const item = element("li");
    const button = element("button", session.label || session.id.slice(0, 8));
    button.dataset.key = `trouble ${session.id} ${trouble.first_step}`;
    button.addEventListener("click", () => choose(session.id));
    item.append(button, element("span", ` ${describe(trouble)}`));
    return item;
  }));
}

function row(session) {
  const made = element("tr");
  made.setAttribute("aria-selected", String(session.id === chosen));
  if (session.bad || session.state === "damaged") made.classList.add("bad");
  COLUMNS.forEach(([, text, wide], index) => {
    const cell = element("td", index ? text(session) : undefined, ...(wide ? [wide] : []));
    if (!index) {
      const button = element("button", text(session));
      button.dataset.key = `session ${session.id}`;
      button.title = session.id;
      button.addEventListener("click", () => choose(session.id));
      cell.append(button);
    }
    made.append(cell);
  });
  return made;
}

function showSessions(sessions) {
  const text = find("#filter").value.toLowerCase();
  const shown = sessions.filter((s) => s.label.toLowerCase().includes(text) || s.id.startsWith(text));
  shown.sort((a, b) => (b.rate || 0) - (a.rate || 0) || a.id.localeCompare(b.id));
  find("#empty").hidden = sessions.length > 0;
  keepFocus(find("#sessions tbody"), shown.map(row));
}

// A list is made anew each second; whoever goes through it by keyboard stays where they are.
function keepFocus(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  parent.replaceChildren(...children);
  if (key !== undefined) [...parent.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key)?.focus();
}

function showDetail(detail, sessions) {
  const session = sessions.find(({ id }) => id === chosen);
  find("#detail").hidden = !detail || !session;
  if (!detail || !session) return;
  find("#detail-title").textContent = `${session.label || "session"} · ${session.id.slice(0, 8)} · ${session.device}`;
  find("#findings").replaceChildren(...session.troubles.map((trouble) => element("li", describe(trouble))).reverse());
  Charts.update(find("#charts"), detail);
  const late = Math.max(...detail.members.map((member) => member.late || 0));
  find("#workers tbody").replaceChildren(...detail.members.map((member) => {
    const made = element("tr");
    if (member.late && member.late === late && late > 0.1) made.classList.add("bad");
    const behind = member.late === null ? "" : `${number(member.late)} s`;
    [String(member.worker), member.attached ? "attached" : "absent", String(member.contribution), behind].forEach((text) => made.append(element("td", text)));
    return made;
  }));
}

function showRefusals(refusals) {
  find("#refusals").hidden = !refusals.length;
  find("#refusals ul").replaceChildren(...refusals.slice(0, 20).map((refusal) => {
    const item = element("li");
    const times = refusal.times > 1 ? ` (${refusal.times} times)` : "";
    item.append(element("strong", refusal.reason), element("span", `${times} ${refusal.text} `), element("time", clock(refusal.at)));
    return item;
  }));
}

function show(state) {
  latest = state;
  alive(state.server.draining ? "lost" : "alive", state.server.draining ? "draining: no new steps" : `alive, version ${state.server.version}`);
  showServer(state.server);
  showTroubles(state.sessions);
  showSessions(state.sessions);
  showDetail(state.detail, state.sessions);
  showRefusals(state.refusals);
}

function alive(state, text) {
  find("#alive").dataset.state = state;
  if (find("#alive").textContent !== text) find("#alive").textContent = text;
}

function listen() {
  source?.close();
  source = new EventSource(`events?session=${encodeURIComponent(chosen)}`);
  source.addEventListener("message", (event) => show(JSON.parse(event.data)));
  source.addEventListener("full", (event) => alive("lost", `${event.data} browsers watch already; close one`));
  source.addEventListener("error", () => alive("lost", "the server does not answer; asking again"));
}

function choose(id) {
  chosen = id === chosen ? "" : id;
  Charts.rebuild();
  if (latest) show({ ...latest, detail: null });
  listen();
}

find("#sessions thead tr").replaceChildren(...COLUMNS.map(([title, , wide]) => element("th", title, ...(wide ? [wide] : []))));
find("#filter").addEventListener("input", () => latest && showSessions(latest.sessions));
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chosen) choose(chosen);
  if (event.key === "/" && document.activeElement !== find("#filter")) {
    event.preventDefault();
    find("#filter").focus();
  }
});
listen();
