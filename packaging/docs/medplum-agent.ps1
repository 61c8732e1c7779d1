@@head

Register-ArgumentCompleter -Native -CommandName @@program -ScriptBlock {
    param($current, $ast, $cursor)
    $given = @($ast.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursor } | ForEach-Object { "$_" })
    $before = @()
    for ($i = 1; $i -lt $given.Count; $i++) {
        if ($given[$i] -cin @@valued) { $i++ } elseif (-not $given[$i].StartsWith('-')) { $before += $given[$i] }
    }
    $at = $before -join ' '
    $dash = $current.StartsWith('-')
    if (-not $dash -and $at -cmatch '^(@@files)$') { return }  # PowerShell offers files by itself
    if ($given[-1] -cin @@file, @@folder, @@free) { return }
    $offer = @(if (-not $dash) { switch -CaseSensitive ($at) {
@@words
    } })
    if (-not $offer) { $offer = @(switch -CaseSensitive -Wildcard ($at) {
@@options
    }) }
    switch -CaseSensitive ($given[-1]) {
@@choices
    }
    foreach ($one in $offer) {
        if ($one[0].StartsWith($current)) {
            [System.Management.Automation.CompletionResult]::new($one[0], $one[0], 'ParameterValue', $one[1])
        }
    }
}
