"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const make = (tag, kind, text, parent) => {
    const node = document.createElement(tag);
    if (kind) node.className = kind;
    // never as markup: what models say comes from strangers
    if (text) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };
  const post = (place, body, signal) =>
    fetch(place, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

  let setup = null;
  let histories = {};
  let going = null;

  function busy(on) {
    find("send").disabled = on || !setup;
    find("halt").disabled = !on;
    find("fresh").disabled = on;
  }

  function column(speaker, grid) {
    const box = make("section", "answer going", "", grid);
    box.dataset.speaker = speaker.name;
    const head = make("h2", "", "", box);
    make("span", "", speaker.name, head);
    make("small", "", speaker.source, head);
    const said = make("p", "", "", box);
    const foot = make("footer", "", "", box);
    const state = make("span", "", "waits", foot);
    const marks = make("span", "", "", foot);
    const stop = make("button", "", "stop", foot);
    stop.type = "button";
    stop.addEventListener("click", () => post("stop", { name: speaker.name }));
    return { box, said, state, marks, stop, text: "", loops: false };
  }

  function show(view, line) {
    if (line.added) {
      view.text += line.added;
      view.said.textContent = view.text;
    }
    if (line.error) {
      view.said.textContent = view.text ? `${view.text}\n${line.error}` : line.error;
      view.said.classList.add("error");
    }
    if (line.tokens !== undefined) {
      const speed = line.tokens_per_second === null ? "" : `${line.tokens_per_second.toFixed(1)} tokens/s, `;
      view.state.textContent = `${speed}${line.tokens} token${line.tokens === 1 ? "" : "s"}`;
    }
    if (line.loops && !view.loops) make("b", "", "loops", view.marks);
    view.loops = view.loops || Boolean(line.loops);
    if (line.done) close(view, line);
  }

  function close(view, line) {
    view.box.classList.remove("going");
    view.stop.remove();
    if (view.state.textContent === "waits") view.state.textContent = "";
    if (!line || line.error || line.done === undefined) return;
    make("b", line.ended ? "good" : "", line.ended ? "ended by itself" : "cut short", view.marks);
  }

  async function read(response, views) {
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const text of lines) {
        const line = JSON.parse(text);
        show(views[line.name], line);
      }
      const form = find("form").getBoundingClientRect();
      if (form.bottom >= window.innerHeight - 2) window.scrollTo(0, document.body.scrollHeight);
    }
  }

  async function ask(words) {
    make("div", "asked", words, find("turns"));
    const grid = make("div", "answers", "", find("turns"));
    const views = {};
    const messages = {};
    for (const speaker of setup.speakers) {
      views[speaker.name] = column(speaker, grid);
      const before = setup.continues ? [] : histories[speaker.name] || [];
      messages[speaker.name] = [...before, { role: "user", content: words }];
    }
    window.scrollTo(0, document.body.scrollHeight);
    going = new AbortController();
    busy(true);
    try {
      const body = { messages, max_new_tokens: Number(find("max").value), temperature: Number(find("temperature").value) };
      const response = await post("answers", body, going.signal);
      if (response.ok) await read(response, views);
      else for (const view of Object.values(views)) show(view, { error: await response.clone().text() });
    } catch (error) {
      if (error.name !== "AbortError") for (const view of Object.values(views)) show(view, { error: "The server is gone." });
    }
    for (const [name, view] of Object.entries(views)) {
      close(view);
      const answer = { role: "assistant", content: view.text };
      if (view.text.trim()) histories[name] = [...messages[name], answer];
    }
    going = null;
    busy(false);
    find("words").focus();
  }

  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const words = find("words").value;
    if (!words.trim() || going || !setup) return;
    find("words").value = "";
    ask(words);
  });
  find("words").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    find("form").requestSubmit();
  });
  find("halt").addEventListener("click", () => post("stop", {}));
  find("fresh").addEventListener("click", () => {
    histories = {};
    find("turns").replaceChildren();
  });

  fetch("speakers")
    .then((response) => response.json())
    .then((found) => {
      setup = found;
      const kind = found.continues ? "A base model: each goes on with what you write." : "Each keeps its own conversation. Enter sends, Shift+Enter is a new line.";
      find("about").textContent = [kind, ...found.left_out].join("\n");
      find("max").value = found.max_new_tokens;
      find("temperature").value = found.temperature;
      find("words").disabled = false;
      find("words").placeholder = found.continues ? "Once upon a time" : "Ask something";
      find("words").focus();
      busy(false);
    });
})();
