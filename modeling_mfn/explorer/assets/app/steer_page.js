"use strict";

MFN.pages.steer = () => MFN.html`<${MFN.Heading} title="Steer" /><${MFN.NeedsServer} what="Steer" />`;
