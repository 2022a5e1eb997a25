// Calls of the server that `mfn explore` starts.
"use strict";

(() => {
  const KEY = "mfn-token";

  // A token comes once in the address; it is kept for this tab and taken out of what a person may copy.
  const address = new URL(location.href);
  if (address.searchParams.has("token")) {
    try {
      sessionStorage.setItem(KEY, address.searchParams.get("token"));
    } catch {
      // without storage, the token lasts until the page is loaded anew
    }
    MFN.token = address.searchParams.get("token");
    address.searchParams.delete("token");
    history.replaceState(null, "", address);
  }
  const token = () => {
    try {
      return MFN.token ?? sessionStorage.getItem(KEY);
    } catch {
      return MFN.token;
    }
  };

  const detail = async (response) => {
    const answer = await response.json().catch(() => null);
    const told = answer?.detail;
    if (typeof told === "string") return told;
    return `The server answered ${response.status} ${response.statusText}.`;
  };

  // One JSON value per line, as they come; a piece of the network may end inside a line.
  const events = async (response, onEvent) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const event of lines.filter((line) => line.trim()).map((line) => JSON.parse(line))) {
        if (event.error) throw new Error(event.error); // the stream had begun: its status could not tell
        onEvent(event);
      }
      if (done) return;
    }
  };

  // MFN.api("read", {text}) -> the answer; with onEvent, each event of a stream, and nothing at the end.
  MFN.api = async (path, body, { method = body === undefined ? "GET" : "POST", signal, onEvent } = {}) => {
    const headers = body === undefined ? {} : { "Content-Type": "application/json" };
    if (token()) headers["X-MFN-Token"] = token();
    const options = { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) };
    const response = await fetch(`api/${path.replace(/^\/?(api\/)?/, "")}`, options).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is `mfn explore` still running?");
    });
    if (!response.ok) throw new Error(await detail(response));
    if (onEvent) return events(response, onEvent);
    return response.status === 204 ? null : response.json();
  };
})();
